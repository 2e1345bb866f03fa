"""Every drafter: its state is a function of the committed tokens, and what it proposes keeps to its budget."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch

from specdec.drafters.base import Drafter, DraftSampling, DraftSetup
from specdec.drafters.draft_model import DraftModelDrafter
from specdec.drafters.prompt_lookup import PromptLookupDrafter
from specdec.drafters.registry import FACTORIES, make_drafter
from specdec.drafters.suffix import SuffixDrafter
from specdec.drafters.suffix_automaton import SuffixAutomaton
from specdec.errors import SpecDecError, VocabularyMismatchError
from specdec.noise import Noise
from specdec.types import Budget, Law
from tests.support_drafters import assert_same_draft, budget_of, commit, setup_of
from tests.support_models import VOCABULARY, prompts, tiny_model

CORPUS = prompts((60, 80), seed=9)
MODEL = tiny_model()
MAKERS: dict[str, Callable[[], Drafter]] = {
    "chain": lambda: DraftModelDrafter(MODEL),
    "tree": lambda: DraftModelDrafter(MODEL, shape="tree"),
    "prompt-lookup": lambda: PromptLookupDrafter(min_ngram=1),
    "suffix": lambda: SuffixDrafter(min_match=1),
    "suffix with corpus": lambda: SuffixDrafter(CORPUS, min_match=1),
}
K = 3


@pytest.mark.parametrize("name", MAKERS)
def test_state_equals_state_rebuilt(name: str) -> None:
    generator = torch.Generator().manual_seed(5)
    drafter, texts = MAKERS[name](), prompts((9, 4), seed=2)
    drafter.begin(tuple(map(tuple, texts)), setup_of())
    for round_ in range(2 * (K + 1)):
        asked = round_ % 3 != 2
        if asked:
            draft = drafter.propose(budget_of((0, 1)))
        # Accept 0 to K of the first path, then a token of the target's own.
        new = []
        for b in range(2):
            count = (round_ + b) % (K + 1)
            own = draft.tree.tokens[b, 1 : 1 + count].tolist() if asked else []
            new.append([*own, int(torch.randint(3, 9, (1,), generator=generator))])
        commit(drafter, texts, (0, 1), new)
        fresh = MAKERS[name]()
        fresh.begin(tuple(map(tuple, texts)), setup_of())
        assert_same_draft(drafter.propose(budget_of((0, 1))), fresh.propose(budget_of((0, 1))))


@pytest.mark.parametrize("name", MAKERS)
def test_requests_may_leave_and_budgets_differ(name: str) -> None:
    drafter, texts = MAKERS[name](), prompts((9, 4, 6), seed=2)
    drafter.begin(tuple(map(tuple, texts)), setup_of())
    drafter.propose(budget_of((0, 1, 2)))
    commit(drafter, texts, (0, 1, 2), [[5], [6, 7], [8]])
    commit(drafter, texts, (2,), [[4, 5]])
    draft = drafter.propose(Budget((2, 0), (4, 0), (K, K), (2, 2)))
    assert draft.tree.num_nodes[1] == 1
    assert draft.tree.tokens[:, 0].tolist() == [texts[2][-1], texts[0][-1]]
    fresh = MAKERS[name]()
    fresh.begin((tuple(texts[2]),), setup_of())
    alone = fresh.propose(Budget((0,), (4,), (K,), (2,)))
    assert alone.tree.num_nodes[0] == draft.tree.num_nodes[0]
    size = alone.tree.num_nodes[0]
    assert torch.equal(draft.tree.tokens[:1, :size], alone.tree.tokens[:, :size])


@pytest.mark.parametrize("nodes", [0, 1, 4, 30])
@pytest.mark.parametrize("name", MAKERS)
def test_budgets_are_kept_and_trees_are_well_formed(name: str, nodes: int) -> None:
    drafter, texts = MAKERS[name](), [t * 3 for t in prompts((5, 7), seed=4)]
    drafter.begin(tuple(map(tuple, texts)), setup_of())
    tree = drafter.propose(budget_of((0, 1), nodes)).tree
    for b, size in enumerate(tree.num_nodes):
        parents = tree.parents[b].tolist()
        assert size - 1 <= nodes
        assert parents[0] == -1
        assert all(0 <= parents[n] < n for n in range(1, size))
        depth = [0] * size
        for n in range(1, size):
            depth[n] = depth[parents[n]] + 1
        assert max(depth) <= K
        children = [(parents[n], int(tree.tokens[b, n])) for n in range(1, size)]
        assert len(set(children)) == len(children), "siblings repeat a token"


def test_a_sampled_chain_repeats_with_its_noise_and_tells_its_law() -> None:
    def process(logits: torch.Tensor, paths: object) -> torch.Tensor:
        return logits.float() / 0.8

    drafts = []
    for seed in (1, 1, 2):
        drafter = MAKERS["chain"]()
        drafter.begin((tuple(prompts((9,))[0]),), setup_of(Law.INDEPENDENT, DraftSampling(process, Noise(seed))))
        drafts.append(drafter.propose(budget_of((0,))))
    assert torch.equal(drafts[0].tree.tokens, drafts[1].tree.tokens)
    q = drafts[0].q
    assert q is not None
    assert q.shape == (1, K + 1, VOCABULARY)
    torch.testing.assert_close(q[:, :K].sum(-1), torch.ones(1, K))
    with torch.no_grad():
        text = torch.tensor([[*prompts((9,))[0], *drafts[0].tree.tokens[0, 1:].tolist()]])
        expected = (MODEL(text).logits[0, 8 : 8 + K] / 0.8).softmax(-1)
    torch.testing.assert_close(q[0, :K], expected, atol=1e-4, rtol=1e-3)


def test_lookup_finds_the_latest_longest_match() -> None:
    drafter = PromptLookupDrafter(min_ngram=2, max_ngram=3)
    drafter.begin(((1, 2, 3, 9, 1, 2, 3, 4, 5, 7, 1, 2, 3),), setup_of())
    assert drafter.propose(budget_of((0,), 3)).tree.tokens.tolist() == [[3, 4, 5, 7]]
    commit(drafter, [[]], (0,), [[8]])
    assert drafter.propose(budget_of((0,), 3)).tree.num_nodes == (1,)


def test_suffix_gives_a_tree_where_continuations_differ() -> None:
    drafter = SuffixDrafter([[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 3, 4]])
    drafter.begin(((9, 1, 2, 3),), setup_of())
    tree = drafter.propose(budget_of((0,))).tree
    assert tree.tokens.tolist() == [[3, 4, 5]]
    assert tree.parents.tolist() == [[-1, 0, 0]]


def test_automaton_holds_every_substring_with_its_count() -> None:
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(0, 3, (n,), generator=generator).tolist() for n in (14, 9, 11)]
    automaton = SuffixAutomaton(texts)
    found = {tuple(t[i:j]) for t in texts for i in range(len(t)) for j in range(i + 1, len(t) + 1)}
    for piece in found:
        state = 0
        for token in piece:
            state = automaton.next[state][token]
        occurrences = sum(tuple(t[i : i + len(piece)]) == piece for t in texts for i in range(len(t)))
        assert automaton.count[state] == occurrences
    across = tuple(texts[0][-2:] + texts[1][:3])
    if across not in found:
        state, matched = 0, 0
        for token in across:
            state, matched = automaton.follow(state, matched, token)
        assert matched < len(across)
    assert all(automaton.length[a] >= 0 for a, _ in pairwise(range(len(automaton.length))))


def test_names_and_wrong_options_are_told() -> None:
    assert {make_drafter(name).name for name in FACTORIES} == set(FACTORIES)
    with pytest.raises(SpecDecError, match="suffix"):
        make_drafter("magic")
    with pytest.raises(SpecDecError, match="min_ngram"):
        PromptLookupDrafter(min_ngram=4, max_ngram=2)
    with pytest.raises(SpecDecError, match="min_match"):
        SuffixDrafter(min_match=0)
    with pytest.raises(SpecDecError, match="shape"):
        DraftModelDrafter(MODEL, shape="star")  # type: ignore[arg-type]
    setup = DraftSetup(torch.device("cpu"), VOCABULARY + 1, 64, Law.DETERMINISTIC)
    with pytest.raises(VocabularyMismatchError, match=str(VOCABULARY)):
        DraftModelDrafter(MODEL).begin(((1, 2),), setup)
