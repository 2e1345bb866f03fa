"""Block verification, its forms on trees and on several paths, and the lenient rule, by exact enumeration in float64."""

from __future__ import annotations

from functools import partial
from itertools import product

import pytest
import torch
from torch import Tensor

from specdec.errors import IncompatibleRuleError, SpecDecError
from specdec.noise import Noise, Stream
from specdec.types import Draft, Law, Scores, TokenTree, Verdict
from specdec.verify.block import Block
from specdec.verify.chooser import NoiseChooser
from specdec.verify.compatibility import NAMES, Rule, rule_for
from specdec.verify.lenient import LenientLossy
from specdec.verify.multi_path_block import MultiPathBlock
from specdec.verify.rejection import TokenRejection
from specdec.verify.traversal import Traversal
from tests.support_enumeration import (
    Draw,
    Replays,
    Table,
    draw_tree,
    drawing,
    expected_acceptance,
    law_error,
    laws_of_round,
)

EXACT = 1e-12
KINDS = ["random", "zeros", "one-hot"]


def _chain(q: Table, *drafted: int, promised: bool = True) -> Draw:
    """Chains of so many drafted tokens for each request; not promised: as trees that happen to be chains."""
    return drawing(q, [range(-1, count) for count in drafted], chain=promised)


@pytest.mark.parametrize("kind_q", KINDS)
@pytest.mark.parametrize("kind_p", KINDS)
def test_a_block_of_two_over_two_rounds(kind_p: str, kind_q: str) -> None:
    assert law_error(Block().verify, _chain(Table(2, 2, kind_q), 2), Table(2, 1, kind_p), 1, 2, 5) < EXACT


@pytest.mark.parametrize("drafted", [1, 3])
def test_other_lengths(drafted: int) -> None:
    assert law_error(Block().verify, _chain(Table(2, 6), drafted), Table(2, 5), 1, 1, drafted + 1) < EXACT


@pytest.mark.parametrize("drafted", [(1, 1), (2, 0)], ids=str)
def test_two_requests_of_different_lengths_over_two_rounds(drafted: tuple[int, int]) -> None:
    assert law_error(Block().verify, _chain(Table(2, 4), *drafted), Table(2, 3), 2, 2, 3) < EXACT


def test_a_draft_equal_to_the_target_is_accepted_whole() -> None:
    p = Table(3, 7)
    assert abs(expected_acceptance(Block().verify, _chain(p, 2), p) - 2) < EXACT


def _deterministic(texts: list[tuple[int, ...]], replays: Replays) -> Draft:
    rows = len(texts)
    parents = torch.tensor([[-1, 0, 1, 2]]).expand(rows, -1)
    return Draft(TokenTree(torch.tensor([[0, 1, 0, 1]]).expand(rows, -1), parents, (4,) * rows, True), Law.DETERMINISTIC)


def test_a_deterministic_chain_is_one_hot_and_keeps_what_token_rejection_keeps() -> None:
    p = Table(3, 9)
    assert law_error(Block().verify, _deterministic, p, 1, 1, 4) < EXACT
    token = expected_acceptance(TokenRejection().verify, _deterministic, p)
    assert abs(expected_acceptance(Block().verify, _deterministic, p) - token) < EXACT


def test_one_token_is_token_rejection() -> None:
    p, q = Table(3, 11), Table(3, 12)
    overlap = float(torch.minimum(p((0,)), q((0,))).sum())
    assert abs(expected_acceptance(Block().verify, _chain(q, 1), p) - overlap) < EXACT


def _expected_weights(p: Table, q: Table, text: tuple[int, ...], weight: float, left: int) -> float:
    """The sum over depths of E[w_i]: token i of a chain is accepted with its path's weight."""
    total = 0.0
    for token, share in enumerate(q(text).tolist() if left else []):
        own = min(1.0, weight * float(p(text)[token]) / share)
        total += share * (own + _expected_weights(p, q, (*text, token), own, left - 1))
    return total


@pytest.mark.parametrize("seed", range(5))
def test_acceptance_is_its_closed_form_and_above_that_of_token_rejection(seed: int) -> None:
    p, q = Table(2, 30 + seed), Table(2, 60 + seed)
    block = expected_acceptance(Block().verify, _chain(q, 3), p)
    token = expected_acceptance(TokenRejection().verify, _chain(q, 3), p)
    assert abs(block - _expected_weights(p, q, (0,), 1.0, 3)) < EXACT
    assert block > token - EXACT


def test_two_tokens_already_keep_more_than_token_rejection() -> None:
    p, q = Table(3, 1), Table(3, 2)
    block, token = (expected_acceptance(rule.verify, _chain(q, 2), p) for rule in (Block(), TokenRejection()))
    assert block > token + 1e-3


@pytest.mark.parametrize("rule", [Traversal(), MultiPathBlock()], ids=lambda r: r.name)
@pytest.mark.parametrize("promised", [True, False], ids=["chain", "tree of one child"])
def test_on_a_chain_the_rules_for_trees_are_the_block_rule(rule: Rule, promised: bool) -> None:
    p, q = Table(2, 13), Table(2, 14)
    found = laws_of_round(rule.verify, _chain(q, 3, promised=promised), p, [((0,),)])[0]
    wanted = laws_of_round(Block().verify, _chain(q, 3), p, [((0,),)])[0]
    assert found.keys() == wanted.keys()
    assert max(abs(found[text] - wanted[text]) for text in wanted) < EXACT


class _FirstRefusalEnds:
    """A chooser that spoils a block: nothing is accepted behind a token that did not pass."""

    def __init__(self, inner: Replays) -> None:
        self.pick, self.coupled, self._accept = inner.pick, inner.coupled, inner.accept

    def accept(self, prob: Tensor) -> Tensor:
        return self._accept(prob).long().cumprod(1).bool()


def test_an_early_break_is_seen() -> None:
    def verify(draft: Draft, scores: Scores, replays: Replays) -> Verdict:
        return Block().verify(draft, scores, _FirstRefusalEnds(replays))

    assert law_error(verify, _chain(Table(3, 2), 2), Table(3, 1), 1, 1, 3) > 1e-2


def test_a_soft_q_for_the_likeliest_token_is_seen() -> None:
    q = Table(3, 2)

    def draw(texts: list[tuple[int, ...]], replays: Replays) -> Draft:
        draft = _chain(q, 1)(texts, replays)
        assert draft.q is not None
        draft.tree.tokens[:, 1] = draft.q[:, 0].argmax(1)
        return draft

    assert law_error(Block().verify, draw, Table(3, 1), 1, 1, 2) > 1e-2


def test_several_paths_keep_more_than_one() -> None:
    p, q = Table(2, 13), Table(2, 14)
    two = partial(draw_tree, q, shapes=[[-1, 0, 0, 1, 2]])
    paths = expected_acceptance(MultiPathBlock().verify, lambda texts, replays: two(texts, replays=replays), p)
    assert paths > expected_acceptance(Block().verify, _chain(q, 2), p) + 1e-3


def test_a_row_of_nan_shows_only_where_it_is_reached() -> None:
    p = torch.full((2, 3, 2), 0.5)
    logits = p.log()
    logits[:, 1] = float("nan")
    q = p.clone()
    q[1, 0] = torch.tensor([0.0, 1.0])
    tree = TokenTree(torch.zeros(2, 3, dtype=torch.long), torch.tensor([[-1, 0, 1]] * 2), (3, 3), True)
    verdict = Block().verify(
        Draft(tree, Law.INDEPENDENT, q), Scores(logits), NoiseChooser(Noise(1), *torch.tensor([[0, 1], [3, 3]]), Stream.ACCEPT)
    )
    assert verdict.num_accepted.tolist() == [1, 0]
    assert verdict.next_token.tolist() == [-1, 0]


def _lenient(lenience: float) -> tuple[float, float]:
    """The error and the acceptance."""
    p, draw, rule = Table(3, 1), _chain(Table(3, 2), 2), LenientLossy(lenience=lenience)
    return law_error(rule.verify, draw, p, 1, 1, 3), expected_acceptance(rule.verify, draw, p)


def test_lenience_is_lossy_by_degrees_and_lossless_at_one() -> None:
    assert not LenientLossy().lossless
    (exact, token), (some, more), (much, most) = _lenient(1.0), _lenient(0.7), _lenient(0.2)
    assert exact < EXACT < some < much
    assert token < more < most


@pytest.mark.parametrize("lenience", [0.0, -1.0, 1.5, float("nan")])
def test_a_lenience_that_is_no_share_is_refused(lenience: float) -> None:
    with pytest.raises(SpecDecError, match="lenience"):
        LenientLossy(lenience=lenience)


@pytest.mark.parametrize(
    ("laws", "shape", "rule", "law"),
    [
        ({Law.INDEPENDENT, Law.DETERMINISTIC}, "chain", "block", Law.INDEPENDENT),
        ({Law.INDEPENDENT}, "tree", "traversal", Law.INDEPENDENT),
        ({Law.INDEPENDENT, Law.WITHOUT_REPLACEMENT}, "tree", "traversal", Law.WITHOUT_REPLACEMENT),
        ({Law.DETERMINISTIC}, "chain", "sample-and-match", Law.DETERMINISTIC),
    ],
)
def test_auto_takes_the_best_exact_rule(laws: set[Law], shape: str, rule: str, law: Law) -> None:
    found, drawn = rule_for("auto", frozenset(laws), shape, True, False, False)
    assert (found.name, drawn) == (rule, law)
    pruned, _ = rule_for("auto", frozenset(laws), shape, True, False, True)
    assert pruned.name == "sample-and-match"


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("auto", "greedy")])
def test_every_named_rule_is_found_or_refused_by_name(name: str) -> None:
    rule, _ = rule_for(name, frozenset(Law), "chain", True, False, False)
    assert rule.lossless is not name.endswith("-lossy")
    for law, shape in product(Law, ("chain", "tree")):
        if law in rule.laws and (rule.trees or shape == "chain"):
            assert rule_for(name, frozenset({law}), shape, True, False, False) == (rule, law)
        else:
            with pytest.raises(IncompatibleRuleError, match=name):
                rule_for(name, frozenset({law}), shape, True, False, False)
