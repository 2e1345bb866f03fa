"""Several drafters of which each round uses one: their states, their laws, and losslessness whichever is chosen."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from specdec.drafters.base import Drafter, DraftSampling, DraftSetup
from specdec.drafters.draft_model import DraftModelDrafter
from specdec.drafters.medusa import MedusaDrafter
from specdec.drafters.medusa_heads import MedusaHeads
from specdec.drafters.pard import PardDrafter
from specdec.drafters.prompt_lookup import PromptLookupDrafter
from specdec.drafters.recycling import RecyclingDrafter
from specdec.drafters.several import SeveralDrafters
from specdec.drafters.suffix import SuffixDrafter
from specdec.errors import IncompatibleRuleError, SpecDecError, VocabularyMismatchError
from specdec.generator import SpeculativeGenerator
from specdec.noise import Noise
from specdec.types import Budget, Committed, Draft, DrafterTraits, Law, Load, RoundStats
from specdec.verify.compatibility import rule_for
from specdec.verify.rejection import TokenRejection
from tests import support_enumeration as tables
from tests.support_compare import assert_same_greedy
from tests.support_drafters import assert_same_draft, budget_of, chi_square, commit, flattened, setup_of
from tests.support_models import VOCABULARY, family_config, left_padded, noised, prompts, tiny_model

K, MASK, WIDTH, NEW = 3, 60, 32, 25
ALPHA = 1e-4
MODEL: Any = tiny_model()
DISTURBED = noised(MODEL, 0.1)
LENGTHS = {"one": (9,), "ragged": (9, 3, 14)}


def _heads() -> MedusaHeads:
    heads = MedusaHeads(WIDTH, VOCABULARY, K, shared_head=False)
    heads.init_from(MODEL.get_output_embeddings().weight.detach())
    return heads


def _chains() -> dict[str, Drafter]:
    return {
        "model": DraftModelDrafter(DISTURBED),
        "lookup": PromptLookupDrafter(min_ngram=1),
        "medusa": MedusaDrafter(_heads()),
        "pard": PardDrafter(MODEL, MASK),
    }


def _trees() -> dict[str, Drafter]:
    return {
        "model": DraftModelDrafter(DISTURBED),
        "suffix": SuffixDrafter(min_match=1),
        "medusa": MedusaDrafter(_heads()),
        "pard": PardDrafter(MODEL, MASK),
        "tree": DraftModelDrafter(DISTURBED, shape="tree"),
    }


@dataclass
class _RandomPlanner:
    """A drafter and a size drawn for each round, before it and from nothing that is drafted."""

    names: tuple[str, ...]
    seed: int
    post_draw: bool = False
    chosen: list[str] = field(default_factory=list)
    rounds: list[RoundStats] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def plan(self, load: Load) -> Budget:
        self.chosen.append(self._random.choice(self.names))
        depth = tuple(max(0, min(self._random.randint(0, K), room - 1)) for room in load.room)
        return Budget(load.requests, tuple(2 * d for d in depth), depth, (2,) * len(depth), drafter=self.chosen[-1])

    def select(self, draft: Draft) -> Draft:
        return draft

    def observe(self, stats: RoundStats) -> None:
        self.rounds.append(stats)

    def accepted(self, name: str) -> int:
        return sum(sum(r.accepted) for r, own in zip(self.rounds, self.chosen, strict=True) if own == name)

    def drafted(self, name: str) -> int:
        return sum(sum(r.drafted) for r, own in zip(self.rounds, self.chosen, strict=True) if own == name)


@torch.no_grad()
def _tell(drafter: Drafter, texts: list[list[int]], new: list[list[int]]) -> None:
    """Add tokens to the texts, and tell the drafter, with the hidden state that chose each last token and no other."""
    paths = tuple(tuple(range(1, len(own))) for own in new)
    hidden = torch.zeros(len(new), max(map(len, new)), WIDTH)
    for b, own in enumerate(new):
        texts[b].extend(own)
        hidden[b, len(own) - 1] = MODEL.model(torch.tensor([texts[b]])).last_hidden_state[0, -2]
    requests, counts = tuple(range(len(new))), tuple(map(len, paths))
    drafter.commit(Committed(requests, tuple(map(tuple, new)), counts, paths, {"last_hidden": hidden}))


def _begun(drafter: Drafter, texts: list[list[int]], setup: DraftSetup) -> None:
    """Begin as if all but the last token of each text had been the prompt."""
    drafter.begin(tuple(tuple(text[:-1]) for text in texts), setup)
    _tell(drafter, [text[:-1] for text in texts], [text[-1:] for text in texts])


def _ask(several: SeveralDrafters, name: str, requests: tuple[int, ...]) -> Draft:
    return several.propose(replace(budget_of(requests, depth=K), drafter=name))


def test_state_equals_state_rebuilt_whichever_was_asked() -> None:
    choices, texts = random.Random(3), prompts((9, 4), seed=2)
    several = SeveralDrafters(_trees())
    _begun(several, texts, setup_of())
    for round_ in range(2 * (K + 1)):
        name = choices.choice([*several.names, None])
        draft = _ask(several, name, (0, 1)) if name else None
        new = []
        for b in range(2):
            own = draft.tree.tokens[b, 1 : 1 + (round_ + b) % (K + 1)].tolist() if draft else []
            new.append([*own[: draft.tree.num_nodes[b] - 1 if draft else 0], 3 + round_])
        _tell(several, texts, new)
        fresh = SeveralDrafters(_trees())
        _begun(fresh, texts, setup_of())
        asked = choices.choice(several.names)
        assert_same_draft(_ask(several, asked, (0, 1)), _ask(fresh, asked, (0, 1)))
    for asked in several.names:
        assert_same_draft(_ask(several, asked, (0, 1)), _ask(fresh, asked, (0, 1)))


@pytest.mark.parametrize("name", ["model", "pard", "tree"])
def test_a_model_that_was_not_asked_for_long_catches_up_in_one_forward(name: str) -> None:
    several, texts = SeveralDrafters(_trees()), prompts((5, 7, 6), seed=2)
    inner: Any = several._drafters[name]
    several.begin(tuple(map(tuple, texts)), setup_of())
    _ask(several, name, (0, 1, 2))
    before, told = list(inner.runner.cache.lengths), prompts((75, 75), seed=8)
    for at in range(0, 75, 5):
        new = [own[at : at + 5] for own in told]
        for request, own in zip((0, 2), new, strict=True):
            texts[request].extend(own)
        taps = {"last_hidden": torch.zeros(2, 5, WIDTH)}
        several.commit(Committed((0, 2), tuple(map(tuple, new)), (4, 4), ((1, 2, 3, 4),) * 2, taps))
        assert inner.runner.cache.lengths == before, "a drafter that is not asked runs nothing"
    # Request 1 has ended, and the order of the others has changed in between.
    draft = _ask(several, name, (2, 0))
    assert inner.runner.cache.lengths == [len(texts[2]), len(texts[0])]
    fresh: Any = _trees()[name]
    fresh.begin((tuple(texts[2]), tuple(texts[0])), setup_of())
    assert_same_draft(draft, fresh.propose(budget_of((0, 1))))


def test_catching_up_has_room_beyond_what_was_reserved() -> None:
    text = prompts((5,))[0]
    drafter = DraftModelDrafter(DISTURBED)
    several = SeveralDrafters([SuffixDrafter(), drafter])
    several.begin((tuple(text),), DraftSetup(torch.device("cpu"), VOCABULARY, 8, Law.DETERMINISTIC))
    reserved = drafter.runner.cache.capacity
    commit(several, [text], (0,), [prompts((150,), seed=6)[0]])
    assert len(text) > reserved
    fresh = DraftModelDrafter(DISTURBED)
    fresh.begin((tuple(text),), setup_of())
    assert_same_draft(_ask(several, "draft-model", (0,)), fresh.propose(budget_of((0,))))


@pytest.mark.parametrize("batch", [pytest.param("one", marks=pytest.mark.slow), "ragged"])
def test_greedy_equals_generate_whichever_drafts(batch: str) -> None:
    inputs = left_padded([text * 2 for text in prompts(LENGTHS[batch])])
    expected = MODEL.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    drafters = SeveralDrafters({**_trees(), "recycling": RecyclingDrafter()})
    accepted = dict.fromkeys(drafters.names, 0)
    for seed in range(3):
        planner = _RandomPlanner(drafters.names, seed)
        tokens = SpeculativeGenerator(MODEL, drafters, planner=planner).generate(**inputs, max_new_tokens=NEW, do_sample=False)
        assert_same_greedy(MODEL, inputs, tokens, expected)
        accepted = {name: count + planner.accepted(name) for name, count in accepted.items()}
    assert min(accepted[name] for name in ("model", "pard", "tree")) > 0
    assert sum(count > 0 for count in accepted.values()) >= 4, accepted


@pytest.mark.parametrize("batch", [pytest.param("one", marks=pytest.mark.slow), "ragged"])
@pytest.mark.parametrize("make", [pytest.param(_chains, marks=pytest.mark.slow, id="chains"), pytest.param(_trees, id="trees")])
def test_coupled_sampling_does_not_depend_on_who_drafts(make: Any, batch: str) -> None:
    inputs = left_padded([text * 2 for text in prompts(LENGTHS[batch])])
    options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": True, "temperature": 0.9, "top_k": 20, "seed": 11}
    expected = SpeculativeGenerator(MODEL, verifier="coupled").generate(**inputs, **options)
    drafters = SeveralDrafters(make())
    for seed in range(2):
        planner = _RandomPlanner(drafters.names, seed)
        generator = SpeculativeGenerator(MODEL, drafters, verifier="coupled", planner=planner)
        assert torch.equal(generator.generate(**inputs, **options), expected)
        assert len(set(planner.chosen)) >= 3
        assert sum(map(planner.accepted, drafters.names)) > 0


class _TableDrafter:
    """Chains of a tabular model, drawn by enumeration; a one-hot table draws nothing and is deterministic."""

    taps: tuple[str, ...] = ()
    shape = "chain"

    def __init__(self, name: str, q: tables.Table, replay: tables.Replay) -> None:
        self.name, self._q, self._replay = name, q, replay
        self.laws = frozenset({Law.DETERMINISTIC} if q.kind == "one-hot" else {Law.DETERMINISTIC, Law.INDEPENDENT})

    def begin(self, prompts: tuple[tuple[int, ...], ...], setup: DraftSetup) -> None:
        self._texts, self._law = [*prompts], setup.law

    def propose(self, budget: Budget) -> Draft:
        draft = tables.draw_chain(self._q, [self._texts[r] for r in budget.requests], budget.nodes, self._replay)
        return draft if self._law is Law.INDEPENDENT else replace(draft, law=self._law, q=None)

    def commit(self, committed: Committed) -> None:
        for request, tokens in zip(committed.requests, committed.tokens, strict=True):
            self._texts[request] = (*self._texts[request], *tokens)


@pytest.mark.parametrize(("requests", "rounds", "depth"), [(1, 2, 2), (2, 2, 1)])
def test_rejection_is_exact_when_the_past_chooses_the_drafter(requests: int, rounds: int, depth: int) -> None:
    p, length = tables.Table(2, 1), 1 + rounds * (depth + 1)

    def run(replay: tables.Replay) -> tables.Law1:
        kinds = {"a": "random", "b": "one-hot", "c": "zeros"}
        drafters = [_TableDrafter(name, tables.Table(2, 2 + i, kind), replay) for i, (name, kind) in enumerate(kinds.items())]
        several = SeveralDrafters(drafters)  # type: ignore[arg-type]
        assert several.laws == {Law.DETERMINISTIC, Law.INDEPENDENT}
        contexts: list[tuple[int, ...]] = [(b,) for b in range(requests)]
        several.begin(tuple(contexts), setup_of(Law.INDEPENDENT))
        everyone = tuple(range(requests))
        for round_ in range(rounds):
            # Whom to ask depends on what all requests have said so far.
            name = several.names[(sum(map(sum, contexts)) + round_) % 3]
            draft = several.propose(Budget(everyone, (depth,) * requests, (depth,) * requests, (1,) * requests, drafter=name))
            old = contexts
            verdict = TokenRejection().verify(draft, tables.scores_of(p, contexts, draft.tree), replay)
            contexts = tables.extend(contexts, draft.tree, verdict)
            new = tuple(text[len(before) :] for text, before in zip(contexts, old, strict=True))
            several.commit(Committed(everyone, new, tuple(len(own) - 1 for own in new)))
        return tables.joint([tables.continue_law(p, text, length) for text in contexts])

    exact = tables.joint([tables.continue_law(p, (b,), length) for b in range(requests)])
    assert tables.total_variation(tables.enumerate_all(run), exact) < 1e-12


@torch.no_grad()
def _exact_laws(text: list[int], temperature: float) -> list[torch.Tensor]:
    """The target's law of the first, second and third token behind a text."""
    first = (MODEL(torch.tensor([text])).logits[0, -1] / temperature).double().softmax(-1)
    every = torch.arange(VOCABULARY)
    rows = torch.cat((torch.tensor(text).expand(VOCABULARY, -1), every[:, None]), 1)
    second = (MODEL(rows).logits[:, -1] / temperature).double().softmax(-1)
    pairs = torch.cartesian_prod(every, every)
    rows = torch.cat((torch.tensor(text).expand(len(pairs), -1), pairs), 1)
    third = (MODEL(rows).logits[:, -1] / temperature).double().softmax(-1)
    both = (first[:, None] * second).flatten()
    return [first, first @ second, both @ third]


@pytest.mark.slow
def test_rejection_sampling_has_the_targets_law_whichever_drafts() -> None:
    text, count, temperature = prompts((5,))[0], 500, 3.0
    drafters = SeveralDrafters(_chains())
    drawn, used = [], set()
    for seed in range(4):
        planner = _RandomPlanner(drafters.names, seed)
        generator = SpeculativeGenerator(MODEL, drafters, verifier="rejection", planner=planner)
        ids = torch.tensor([text] * count)
        out = generator.generate(ids, max_new_tokens=3, do_sample=True, temperature=temperature, top_k=0, seed=seed)
        drawn.append(out[:, len(text) :])
        used |= {name for name in drafters.names if planner.drafted(name)}
    assert len(used) >= 3
    tokens = torch.cat(drawn)
    for place, law in enumerate(_exact_laws(text, temperature)):
        counts = torch.bincount(tokens[:, place], minlength=VOCABULARY).double()
        assert chi_square(counts, law / law.sum() * len(tokens)) > ALPHA


def test_each_drafter_draws_by_the_law_of_the_call_if_it_can() -> None:
    several, text = SeveralDrafters(_chains()), tuple(prompts((9,))[0] * 2)
    setup = setup_of(Law.INDEPENDENT, DraftSampling(flattened, Noise(5)))
    _begun(several, [list(text)], setup)
    for name in several.names:
        draft = _ask(several, name, (0,))
        assert (draft.law, draft.q is None) == ((Law.DETERMINISTIC, True) if name == "lookup" else (Law.INDEPENDENT, False))
        assert draft.tree.num_nodes[0] > 1


def test_what_a_planner_and_an_engine_read() -> None:
    several = SeveralDrafters({**_trees(), "recycling": RecyclingDrafter()})
    assert several.names == ("model", "suffix", "medusa", "pard", "tree", "recycling")
    assert several.traits[:2] == (DrafterTraits("model", "chain"), DrafterTraits("suffix", "tree"))
    assert several.shape == "tree"
    assert several.taps == ("last_hidden", "top_k:8")
    assert several.laws == {Law.DETERMINISTIC, Law.INDEPENDENT, Law.COUPLED}
    assert (several.vocabulary, several.runner.device) == (VOCABULARY, torch.device("cpu"))
    chains = SeveralDrafters(_chains())
    assert chains.shape == "chain"
    before = chains.runner.forward_s
    chains.begin((tuple(prompts((9,))[0]),), setup_of())
    _ask(chains, "model", (0,))
    between = chains.runner.forward_s
    _ask(chains, "pard", (0,))
    assert before < between < chains.runner.forward_s
    lookups = SeveralDrafters([SuffixDrafter(), PromptLookupDrafter()])
    assert not any(hasattr(lookups, name) for name in ("runner", "vocabulary"))
    assert lookups.laws == {Law.DETERMINISTIC}


def test_no_name_in_a_budget_means_the_first() -> None:
    several, text = SeveralDrafters([SuffixDrafter(min_match=1), DraftModelDrafter(DISTURBED)]), prompts((4,))[0]
    several.begin(((*text, 60, *text),), setup_of())
    assert_same_draft(several.propose(budget_of((0,))), _ask(several, "suffix", (0,)))
    with pytest.raises(SpecDecError, match=r"'magic'.*suffix, draft-model"):
        several.propose(Budget((0,), (2,), (2,), (1,), drafter="magic"))


def _with_laws(name: str, laws: set[Law]) -> Drafter:
    drafter: Any = SuffixDrafter()
    drafter.name = name
    drafter.laws = frozenset(laws)
    return drafter  # type: ignore[no-any-return]


def test_the_automatic_rule_verifies_all_that_is_drawn() -> None:
    for drafters, shape in ((_chains(), "chain"), (_trees(), "tree")):
        several = SeveralDrafters(drafters)
        for sampling, seeded, post_draw in itertools.product((True, False), repeat=3):
            rule, law = rule_for("auto", several.laws, shape, sampling, seeded, post_draw)
            assert several.drawn(law) <= rule.laws
        assert several.drawn(Law.INDEPENDENT) == {Law.INDEPENDENT, Law.DETERMINISTIC}
        assert several.drawn(Law.DETERMINISTIC) == {Law.DETERMINISTIC}


def test_a_law_serves_where_the_others_can_be_deterministic() -> None:
    det, ind, cou = Law.DETERMINISTIC, Law.INDEPENDENT, Law.COUPLED
    common: list[tuple[set[Law], set[Law], set[Law]]] = [
        ({det, ind}, {ind, cou}, {ind, cou}),
        ({det}, {cou}, {cou}),
        ({ind}, {ind, cou}, {ind}),
        ({det, ind}, {det, cou}, {det, ind, cou}),
    ]
    for first, second, expected in common:
        assert SeveralDrafters([_with_laws("a", first), _with_laws("b", second)]).laws == expected
    with pytest.raises(IncompatibleRuleError, match="a: independent; b: coupled"):
        SeveralDrafters([_with_laws("a", {Law.INDEPENDENT}), _with_laws("b", {Law.COUPLED})])
    with pytest.raises(IncompatibleRuleError, match="rejection"):
        SpeculativeGenerator(MODEL, SeveralDrafters(_trees()), verifier="rejection")


def test_what_does_not_fit_is_told_with_names() -> None:
    suffix = SuffixDrafter()
    named = SeveralDrafters([DraftModelDrafter(DISTURBED), _with_laws("draft-model-2", {Law.DETERMINISTIC}), suffix])
    assert named.names == ("draft-model", "draft-model-2", "suffix")
    again = SeveralDrafters([_with_laws(name, {Law.DETERMINISTIC}) for name in ("a-2", "a", "a", "a")])
    assert again.names == ("a-2", "a", "a-3", "a-4")
    with pytest.raises(SpecDecError, match="no drafter"):
        SeveralDrafters([])
    with pytest.raises(SpecDecError, match=r"'mine'.*Linear"):
        SeveralDrafters({"mine": torch.nn.Linear(1, 1)})  # type: ignore[dict-item]
    with pytest.raises(SpecDecError, match="flat"):
        SeveralDrafters([suffix, SeveralDrafters([SuffixDrafter()])])
    with pytest.raises(SpecDecError, match="twice"):
        SeveralDrafters({"a": suffix, "b": suffix})
    with pytest.raises(SpecDecError, match="named 3"):
        SeveralDrafters({3: suffix})  # type: ignore[dict-item]
    config = family_config("llama")
    config.vocab_size = VOCABULARY + 1
    other = type(MODEL)(config)
    with pytest.raises(VocabularyMismatchError, match=r"'a' has 61 tokens.*'b' 62"):
        SeveralDrafters({"a": DraftModelDrafter(DISTURBED), "b": DraftModelDrafter(other)})
    elsewhere: Any = _with_laws("far", {Law.DETERMINISTIC})
    elsewhere.runner = torch.nn.Parameter(torch.zeros(1, device="meta"))
    with pytest.raises(SpecDecError, match=r"'draft-model' is on cpu.*'far' on meta"):
        SeveralDrafters([DraftModelDrafter(DISTURBED), elsewhere])


def test_a_list_or_dict_of_what_is_allowed_makes_several() -> None:
    inputs = {"input_ids": torch.tensor(prompts((9,)))}
    expected = MODEL.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    given: list[Any] = [["suffix", DISTURBED], ("recycling", DISTURBED), {"text": "suffix", "small": DISTURBED}]
    for drafter, names in zip(given, [("suffix", "draft-model"), ("recycling", "draft-model"), ("text", "small")], strict=True):
        planner = _RandomPlanner(names, 1)
        generator = SpeculativeGenerator(MODEL, drafter, planner=planner)
        assert isinstance(generator.engine.drafter, SeveralDrafters)
        assert generator.engine.drafter.names == names
        assert torch.equal(generator.generate(**inputs, max_new_tokens=NEW, do_sample=False), expected)
        assert planner.drafted(names[1]) > 0
    with pytest.raises(SpecDecError, match="None is among"):
        SpeculativeGenerator(MODEL, ["suffix", None])  # type: ignore[list-item]
    with pytest.raises(SpecDecError, match="flat"):
        SpeculativeGenerator(MODEL, ["suffix", ["recycling"]])  # type: ignore[list-item]
    with pytest.raises(SpecDecError, match="list or dict"):
        SpeculativeGenerator(MODEL, 3)  # type: ignore[arg-type]
