"""Retrieval drafts what datastores, earlier answers and the request's own text agree on, and never changes the text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from specdec.drafters.base import DraftSetup
from specdec.drafters.datastore import Datastore
from specdec.drafters.datastore_build import build_datastore
from specdec.drafters.lookup_base import likeliest_tree
from specdec.drafters.retrieval import AnswerCache, RetrievalDrafter, Worth, tree_of_rows
from specdec.errors import CheckpointError, SpecDecError, VocabularyMismatchError
from specdec.generator import SpeculativeGenerator
from specdec.planner import FixedPlanner
from specdec.types import Budget, Committed, Draft, Law
from tests.support_compare import RecordingPlanner, assert_same_greedy
from tests.support_models import VOCABULARY, left_padded, prompts, tiny_model

pytestmark = pytest.mark.slow

K, NEW = 4, 40
LENGTHS = {"one": (9,), "ragged": (9, 3, 14)}
PLAN = FixedPlanner(nodes=8, depth=K, width=2)


def _store(path: Path, documents: list[list[int]]) -> Datastore:
    return build_datastore(path, documents, VOCABULARY)


def _begun(drafter: RetrievalDrafter, *texts: list[int]) -> RetrievalDrafter:
    drafter.begin(tuple(map(tuple, texts)), DraftSetup(torch.device("cpu"), VOCABULARY, 256, Law.DETERMINISTIC))
    return drafter


def _propose(drafter: RetrievalDrafter, requests: int = 1, nodes: int = 6) -> Draft:
    return drafter.propose(Budget(tuple(range(requests)), (nodes,) * requests, (K,) * requests, (2,) * requests))


def _drafted(drafter: RetrievalDrafter) -> list[int]:
    tokens: list[int] = _propose(drafter).tree.tokens[0, 1:].tolist()
    return tokens


def _commit(drafter: RetrievalDrafter, *tokens: list[int]) -> None:
    requests = tuple(range(len(tokens)))
    drafter.commit(Committed(requests, tuple(map(tuple, tokens)), tuple(len(t) - 1 for t in tokens)))


def _generate(model: Any, drafter: Any, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, RecordingPlanner]:
    planner = RecordingPlanner(PLAN)
    generator = SpeculativeGenerator(model, drafter, planner=planner)
    return generator.generate(**inputs, max_new_tokens=NEW, do_sample=False), planner


@pytest.mark.parametrize("batch", LENGTHS)
def test_greedy_equals_generate(tmp_path: Path, batch: str) -> None:
    model: Any = tiny_model()
    inputs = left_padded(prompts(LENGTHS[batch]))
    expected = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    # Parts of the answers, and parts that go wrong half-way.
    true = [row[-NEW:][at : at + 12].tolist() for row in expected for at in (0, 9, 20)]
    wrong = [[*t[:6], *prompts((6,), seed=i)[0]] for i, t in enumerate(true)]
    stores = [_store(tmp_path / "project", wrong), _store(tmp_path / "common", true)]
    for options in ({}, {"own_text": False, "cache": False}, {"skip_below": 0.0, "min_match": 1}, {"skip_below": 1.0}):
        drafter = RetrievalDrafter(stores, **options)  # type: ignore[arg-type]
        for _ in range(2):
            tokens, planner = _generate(model, drafter, inputs)
            assert_same_greedy(model, inputs, tokens, expected)
            assert options.get("skip_below") == 1.0 or max(planner.accepted_lengths()) > 1


def test_sampling_does_not_depend_on_the_drafter(tmp_path: Path) -> None:
    model: Any = tiny_model()
    inputs = left_padded(prompts((9, 3)))
    options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": True, "temperature": 0.7, "seed": 5}
    expected = SpeculativeGenerator(model, verifier="coupled").generate(**inputs, **options)
    store = _store(tmp_path / "store", [row[-NEW:].tolist() for row in expected])
    planner = RecordingPlanner(PLAN)
    generator = SpeculativeGenerator(model, RetrievalDrafter([store]), verifier="coupled", planner=planner)
    assert torch.equal(generator.generate(**inputs, **options), expected)
    assert max(planner.accepted_lengths()) > 1


def test_state_equals_state_rebuilt(tmp_path: Path) -> None:
    """Without what is shared between rounds; see the next test for the cache."""
    store = _store(tmp_path / "store", prompts((80, 60), seed=9))

    def make() -> RetrievalDrafter:
        return RetrievalDrafter([store], min_match=1, cache=False, skip_below=0)

    generator = torch.Generator().manual_seed(5)
    texts = prompts((9, 4), seed=2)
    drafter = _begun(make(), *texts)
    for round_ in range(2 * (K + 1)):
        asked = round_ % 3 != 2
        draft = _propose(drafter, 2) if asked else None
        new = []
        for b in range(2):
            own = draft.tree.tokens[b, 1 : 1 + (round_ + b) % (K + 1)].tolist() if draft is not None else []
            new.append([*own, int(torch.randint(3, 9, (1,), generator=generator))])
            texts[b] += new[b]
        _commit(drafter, *new)
        mine, fresh = _propose(drafter, 2).tree, _propose(_begun(make(), *texts), 2).tree
        assert mine.num_nodes == fresh.num_nodes
        assert torch.equal(mine.tokens, fresh.tokens)
        assert torch.equal(mine.parents, fresh.parents)


def test_the_cache_is_a_function_of_what_was_committed() -> None:
    """Not of what was drafted: one drafter is asked in every round, the other never, and both then draft the same."""
    drafters = [RetrievalDrafter(own_text=False, min_match=1, skip_below=0) for _ in range(2)]
    texts = prompts((5, 7), seed=4)
    for drafter in drafters:
        _begun(drafter, *texts)
    generator = torch.Generator().manual_seed(3)
    for _ in range(12):
        new = [torch.randint(3, 8, (2,), generator=generator).tolist() for _ in texts]
        _propose(drafters[0], 2)
        for drafter in drafters:
            _commit(drafter, *new)
    sizes = set()
    for text in ([3, 4, 5], [7, 7], [6, 3]):
        mine, other = (_propose(_begun(drafter, text)).tree for drafter in drafters)
        assert torch.equal(mine.tokens, other.tokens)
        assert torch.equal(mine.parents, other.parents)
        sizes.add(mine.num_nodes[0])
    assert max(sizes) > 1


def test_answers_are_remembered_across_requests_and_calls_and_prompts_are_not() -> None:
    drafter = _begun(RetrievalDrafter(own_text=False), [3, 4, 5, 6], [9, 9])
    _commit(drafter, [7, 8, 10, 11], [12])
    assert _drafted(_begun(drafter, [20, 7, 8])) == [10, 11]
    assert _drafted(_begun(drafter, [20, 5, 6])) == [7, 8, 10, 11], "what the target said behind the prompt"
    assert _drafted(_begun(drafter, [20, 4, 5])) == [], "the prompt's own words are not an answer"
    assert _drafted(_begun(RetrievalDrafter(own_text=False), [20, 7, 8])) == []
    assert _drafted(_begun(RetrievalDrafter(cache=False), [20, 7, 8])) == []


def test_the_cache_forgets_the_oldest_first_and_keeps_the_latest_places() -> None:
    cache = AnswerCache(2, 4, capacity=6)
    texts = [[3, 4, 5], [3, 4, 6], [3, 4, 7], [8, 9, 10, 11]]
    for text in texts[:3]:
        cache.add(text)
    length, found = cache.longest([1, 3, 4])
    assert length == 2
    assert [text[place] for text, place in found] == [7, 6, 5]
    for n in (1, 2, 3, 4):
        cache.add(texts[3][:n])
    assert [text[place] for text, place in cache.longest([3, 4])[1]] == [7, 6]
    for n in range(1, 7):
        cache.add(list(range(20, 20 + n)))
    assert cache.longest([3, 4]) == (0, [])
    assert not [key for key, places in cache._places.items() if not places]


def test_the_longer_match_wins_in_the_cache() -> None:
    cache = AnswerCache(2, 4)
    cache.add([5, 3, 4, 9])
    cache.add([6, 3, 4, 8])
    assert cache.longest([5, 3, 4]) == (3, [([5, 3, 4, 9], 3)])


def test_the_longest_match_wins_and_a_tie_goes_to_the_first(tmp_path: Path) -> None:
    project = _store(tmp_path / "project", [[4, 5, 6, 7]])
    common = _store(tmp_path / "common", [[3, 4, 5, 9], [4, 5, 10]])
    assert _drafted(_begun(RetrievalDrafter([project, common]), [20, 4, 5])) == [6, 7]
    assert _drafted(_begun(RetrievalDrafter([common, project]), [20, 4, 5])) == [9, 10]
    assert _drafted(_begun(RetrievalDrafter([project, common]), [3, 4, 5])) == [9]
    assert _drafted(_begun(RetrievalDrafter([project, common]), [4, 5, 30, 4, 5])) == [30, 4, 5], "the own text is nearer"
    assert _drafted(_begun(RetrievalDrafter([project], own_text=False), [4, 5, 30, 4, 5])) == [6, 7]
    assert _drafted(_begun(RetrievalDrafter([str(tmp_path / "project")], min_match=3), [20, 4, 5])) == []


def test_a_match_that_leads_nowhere_gives_way(tmp_path: Path) -> None:
    ends = _store(tmp_path / "ends", [[3, 4, 5]])
    goes_on = _store(tmp_path / "goes on", [[4, 5, 8]])
    assert _drafted(_begun(RetrievalDrafter([ends, goes_on]), [3, 4, 5])) == [8]


def test_a_source_that_does_not_pay_is_left_out_and_tried_again(tmp_path: Path) -> None:
    store = _store(tmp_path / "store", [[4, 5, 6, 7]])
    drafter = RetrievalDrafter([store], own_text=False, cache=False, skip_below=0.2)
    asked = []
    _begun(drafter, [4, 5])
    for _ in range(120):
        asked.append(bool(_drafted(drafter)))
        _commit(drafter, [4, 5])
    gaps = [n for n in "".join("x" if a else "." for a in asked).split("x") if n]
    assert asked[0]
    assert [len(gap) for gap in gaps[:4]] == [4, 8, 16, 32]
    assert asked.count(True) < 12
    # From now on it is right: once tried again, it is asked in every round.
    for _ in range(80):
        _commit(drafter, [*_drafted(drafter), 4, 5])
    assert _drafted(drafter)
    # The same rounds without a draft teach nothing.
    silent = _begun(RetrievalDrafter([store], own_text=False, cache=False, skip_below=0.2), [4, 5])
    for _ in range(40):
        _commit(silent, [4, 5])
    assert _drafted(silent)


def test_worth_decides_only_when_a_round_is_over() -> None:
    worth = Worth(2, 0.2)
    for _ in range(9):
        worth.learn(1, 0, 8)
    assert worth.is_asked(1)
    worth.end_round()
    assert not worth.is_asked(1)
    assert worth.is_asked(0)
    free = Worth(1, 0.0)
    for _ in range(100):
        free.learn(0, 0, 8)
        free.end_round()
    assert free.is_asked(0)


def test_trees_keep_to_their_budget() -> None:
    rows = [[a, b, c] for a in range(3) for b in range(2) for c in range(2)]
    for nodes in (0, 1, 3, 9):
        for depth in (1, 2, 5):
            for width in (1, 2, 3):
                tokens, parents = tree_of_rows(rows, nodes, depth, width)
                assert len(tokens) <= nodes
                level = [0]
                for n, parent in enumerate(parents, 1):
                    assert parent < n
                    level.append(level[parent] + 1)
                assert max(level) <= depth
                expanded = {level[parent]: set[int]() for parent in parents}
                for parent in parents:
                    expanded[level[parent]].add(parent)
                    assert parents.count(parent) <= width
                assert all(len(own) <= width for own in expanded.values())
    assert tree_of_rows([], 4, 4, 2) == ([], [])
    assert tree_of_rows([[], [5]], 4, 4, 2) == ([5], [0])


def test_an_unlikely_path_is_not_worth_a_row() -> None:
    rows = [[1, 2]] * 19 + [[3, 4]]
    assert tree_of_rows(rows, 9, 2, 4) == ([1, 2], [0, 1])
    assert likeliest_tree(0, lambda _: [(0.5, 7, 0)], 99, 99, 1) == ([7, 7, 7], [0, 1, 2])


def test_wrong_options_are_told(tmp_path: Path) -> None:
    store = build_datastore(tmp_path / "store", [[1, 2]], 5000)
    with pytest.raises(VocabularyMismatchError, match="5000"):
        _begun(RetrievalDrafter([store]), [1, 2])
    for options, what in (
        ({"min_match": 0}, "min_match"),
        ({"min_match": 5, "max_match": 4}, "max_match"),
        ({"max_match": 65}, "max_match"),
        ({"skip_below": 2}, "skip_below"),
        ({"datastores": store}, "list"),
        ({"own_text": False, "cache": False}, "nothing to search"),
    ):
        with pytest.raises(SpecDecError, match=what):
            RetrievalDrafter(**{"datastores": [store] if what == "max_match" else [], **options})  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="no meta"):
        RetrievalDrafter([tmp_path])
