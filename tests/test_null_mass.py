"""Null-mass repair: tokens may be dropped for what they are, if it is told; by exact enumeration in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from specdec.drafters.draft_model import DraftModelDrafter
from specdec.errors import IncompatibleRuleError
from specdec.generator import SpeculativeGenerator
from specdec.noise import Noise, Stream
from specdec.tetris import TetrisPlanner, best_nodes, kept_tokens
from specdec.types import Draft, Law, Scores, SlotStats, TokenTree
from specdec.verify.block import Block
from specdec.verify.chooser import NoiseChooser
from specdec.verify.compatibility import Rule
from specdec.verify.multi_path_block import MultiPathBlock
from specdec.verify.null_mass import RepairedDraft, repaired
from specdec.verify.recursive import Recursive
from specdec.verify.rejection import TokenRejection
from specdec.verify.sample_and_match import SampleAndMatch
from specdec.verify.traversal import Traversal
from tests.support_enumeration import (
    Draw,
    Law1,
    Replays,
    Table,
    Texts,
    continue_law,
    drawing,
    expected_acceptance,
    joint,
    law_of_rounds,
    total_variation,
)
from tests.support_models import left_padded, noised, prompts, tiny_model

EXACT = 1e-12
RULES: list[Rule] = [TokenRejection(), Block(), Traversal(), Recursive(), MultiPathBlock()]
every_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)


def _chains(q: Table, drafted: tuple[int, ...]) -> Draw:
    return drawing(q, [range(-1, count) for count in drafted], chain=True)


def _confident(q: Table, drafted: int, least: float, *, repair: bool = True) -> Draw:
    """Chains that end before the first drawn token of less than this probability."""
    draw = _chains(q, (drafted,))

    def pruned(texts: list[tuple[int, ...]], replays: Replays) -> Draft:
        draft = draw(texts, replays)
        assert draft.q is not None
        own = draft.q[:, :-1].gather(2, draft.tree.tokens[:, 1:, None])[..., 0] >= least
        sizes = tuple([1 + int(row.long().cumprod(0).sum()) for row in own])
        return _as_wide(draft, repaired(draft, draft.q >= least, sizes), repair)

    return pruned


def _as_wide(draft: Draft, cut: Draft, repair: bool) -> Draft:
    """The cut draft in tensors of the whole one's width, so that a replay meets the same draws in every batch."""
    assert draft.q is not None
    assert isinstance(cut, RepairedDraft)
    assert cut.q is not None
    assert cut.dropped is not None
    more = draft.tree.tokens.shape[1] - cut.tree.tokens.shape[1]
    tokens, parents = (torch.nn.functional.pad(values, (0, more)) for values in (cut.tree.tokens, cut.tree.parents))
    tree = TokenTree(tokens, parents, cut.tree.num_nodes, True)
    if not repair:
        return Draft(tree, draft.law, draft.q)
    q, dropped = torch.nn.functional.pad(cut.q, (0, 0, 0, more)), torch.nn.functional.pad(cut.dropped, (0, more))
    return RepairedDraft(tree, draft.law, q, dropped=dropped)


def _error(rule: Rule, draw: Draw, p: Table, requests: int, rounds: int, length: int) -> float:
    """The largest error of one request's own law."""
    contexts: Texts = tuple((b,) for b in range(requests))
    joined = law_of_rounds(rule.verify, draw, p, contexts, rounds, length + 1)
    assert abs(sum(joined.values()) - 1) < EXACT
    worst = 0.0
    for b in range(requests):
        own: Law1 = {}
        for text, weight in joined.items():
            part = text[b * (length + 1) : (b + 1) * (length + 1)]
            own[part] = own.get(part, 0.0) + weight
        worst = max(worst, total_variation(own, continue_law(p, (b,), length + 1)))
    return worst


@pytest.mark.parametrize(
    ("kind_p", "kind_q"), [("random", "random"), ("zeros", "random"), ("random", "zeros"), ("one-hot", "zeros")]
)
@every_rule
def test_dropping_unlikely_tokens_is_exact_once_it_is_told(rule: Rule, kind_p: str, kind_q: str) -> None:
    p, draw = Table(3, 1, kind_p), _confident(Table(3, 2, kind_q), 2, 0.3)
    assert _error(rule, draw, p, 1, 1, 3) < EXACT


@every_rule
def test_over_two_rounds(rule: Rule) -> None:
    assert _error(rule, _confident(Table(2, 2), 2, 0.4), Table(2, 1), 1, 2, 4) < EXACT


@every_rule
def test_the_same_chains_untold_are_seen(rule: Rule) -> None:
    assert _error(rule, _confident(Table(3, 2), 2, 0.3, repair=False), Table(3, 1), 1, 1, 3) > 1e-2


def _selected(q: Table, drafted: tuple[int, ...], capacity: int, *, repair: bool = True) -> Draw:
    """Chains of several requests, of which the most likely nodes are kept, as many as there is room for."""
    draw, requests = _chains(q, drafted), len(drafted)

    def select(texts: list[tuple[int, ...]], replays: Replays) -> Draft:
        whole = draw(texts, replays)
        parts = [_one_round(whole, b, requests, capacity) for b in range(0, len(texts), requests)]
        assert whole.q is not None
        tree = TokenTree(
            torch.cat([part.tree.tokens for part in parts]),
            torch.cat([part.tree.parents for part in parts]),
            sum([part.tree.num_nodes for part in parts], ()),
            True,
        )
        if not repair:
            return Draft(tree, whole.law, whole.q)
        return RepairedDraft(tree, whole.law, _joined(parts, "q"), dropped=_joined(parts, "dropped"))

    return select


def _one_round(whole: Draft, first: int, requests: int, capacity: int) -> Draft:
    """What the planner keeps of these requests' chains."""
    assert whole.q is not None
    rows = slice(first, first + requests)
    tree = TokenTree(whole.tree.tokens[rows], whole.tree.parents[rows], whole.tree.num_nodes[rows], True)
    q = whole.q[rows]
    drawn = q[:, :-1].gather(2, tree.tokens[:, 1:, None])[..., 0]
    draft = Draft(tree, whole.law, q, slots=SlotStats(drawn, drawn, drawn))
    return _as_wide(draft, TetrisPlanner(capacity, repair=True).select(draft), True)


def _joined(parts: list[Draft], name: str) -> Tensor:
    return torch.cat([getattr(part, name) for part in parts])


@pytest.mark.parametrize(("drafted", "capacity"), [((1, 1), 1), ((2, 1), 2), ((2, 2), 3)], ids=str)
@pytest.mark.parametrize("rule", [TokenRejection(), Block()], ids=lambda rule: rule.name)
def test_requests_under_one_budget_each_keep_the_target_s_law(rule: Rule, drafted: tuple[int, ...], capacity: int) -> None:
    p, q = Table(2, 3), Table(2, 4)
    assert _error(rule, _selected(q, drafted, capacity), p, 2, 1, 3) < EXACT
    if drafted == (2, 1):
        assert _error(rule, _selected(q, drafted, capacity, repair=False), p, 2, 1, 3) > 1e-3


def test_but_requests_under_one_budget_are_not_independent() -> None:
    p, contexts, draw = Table(3, 13), ((0,), (1,)), _selected(Table(3, 24), (1, 1), 1)
    assert _error(TokenRejection(), draw, p, 2, 1, 1) < EXACT
    joined = law_of_rounds(TokenRejection().verify, draw, p, contexts, 1, 2)
    assert total_variation(joined, joint([continue_law(p, context, 2) for context in contexts])) > 1e-3


@pytest.mark.parametrize("rule", [TokenRejection(), Block()], ids=lambda rule: rule.name)
def test_and_over_two_rounds(rule: Rule) -> None:
    assert _error(rule, _selected(Table(2, 4), (1, 1), 1), Table(2, 3), 2, 2, 3) < EXACT


def test_the_repair_keeps_more_than_matching_does() -> None:
    p, draw = Table(3, 1), _confident(Table(3, 2), 2, 0.3)
    matched = expected_acceptance(SampleAndMatch().verify, draw, p)
    token, block = (expected_acceptance(rule.verify, draw, p) for rule in (TokenRejection(), Block()))
    assert matched < token < block + EXACT


def test_what_would_have_been_kept_is_what_is_kept_when_it_is_drawn() -> None:
    generator = torch.Generator().manual_seed(0)
    for case in range(40):
        q = torch.rand(3, 4, 5, generator=generator).round(decimals=case % 3).clamp(0.01, 1.0)
        sizes, capacity = [3, case % 4, 2], 1 + case % 6
        tokens = torch.randint(5, (3, 3), generator=generator)
        drawn = [q[b, : sizes[b]].gather(1, tokens[b, : sizes[b], None])[:, 0].tolist() for b in range(3)]
        would = kept_tokens(q, drawn, capacity)
        for b, size in enumerate(sizes):
            for n in range(size):
                for token in range(5):
                    # The same draws but for this one; what comes behind it never decides.
                    other = [list(row) for row in drawn]
                    other[b][n:] = [float(q[b, n, token])]
                    kept = best_nodes(other, [list(range(len(row))) for row in other], capacity)
                    assert bool(would[b, n, token]) == (len(kept[b]) > n)


def test_a_whole_draft_stays_as_it_is_and_other_laws_are_only_cut() -> None:
    whole = _chains(Table(3, 2), (2, 2))([(0,), (1,)], Replays([[]], 2))
    ones = torch.ones(2, 2)
    planner = TetrisPlanner(4, repair=True)
    assert not planner.post_draw
    assert type(planner.select(replace(whole, slots=SlotStats(ones, ones, ones)))) is Draft
    for law in (Law.DETERMINISTIC, Law.COUPLED):
        cut = TetrisPlanner(2, repair=True).select(Draft(whole.tree, law, slots=SlotStats(ones, ones, ones)))
        assert sum(cut.tree.num_nodes) == 4
        assert type(cut) is Draft
        assert not cut.post_draw


def test_a_drawn_tree_is_refused() -> None:
    tree = TokenTree(torch.zeros(1, 3, dtype=torch.long), torch.tensor([[-1, 0, 0]]), (3,))
    q, ones = torch.full((1, 3, 2), 0.5), torch.ones(1, 2)
    with pytest.raises(IncompatibleRuleError, match="without_replacement"):
        TetrisPlanner(1, repair=True).select(Draft(tree, Law.WITHOUT_REPLACEMENT, q, slots=SlotStats(ones, ones, ones)))


def test_behind_nan_nothing_is_judged_and_the_row_shows_only_where_it_is_reached() -> None:
    p = torch.full((2, 2, 2), 0.5)
    logits = p.log()
    logits[0, 1] = float("nan")
    tree = TokenTree(torch.zeros(2, 2, dtype=torch.long), torch.tensor([[-1, 0]] * 2), (2, 2), True)
    q = torch.tensor([[[0.5, 0.5], [0.5, 0.0]]]).expand(2, -1, -1)
    draft = RepairedDraft(tree, Law.INDEPENDENT, q, dropped=torch.tensor([[False, True]] * 2))
    for rule in (TokenRejection(), Block()):
        chooser = NoiseChooser(Noise(1), *torch.tensor([[0, 1], [3, 3]]), Stream.ACCEPT)
        verdict = rule.verify(draft, Scores(logits), chooser)
        # p = q on the kept half behind node 1, so only the other token can come next.
        assert verdict.num_accepted.tolist() == [1, 1]
        assert verdict.next_token.tolist() == [-1, 1]


@pytest.mark.slow
@pytest.mark.parametrize("verifier", ["rejection", "block"])
def test_end_to_end_a_cold_draft_is_greedy_decoding_under_the_repair(verifier: str) -> None:
    model: Any = tiny_model()
    inputs = left_padded(prompts((9, 3, 14)))
    planner = TetrisPlanner(5, repair=True)
    generator = SpeculativeGenerator(model, DraftModelDrafter(noised(model, 0.1)), verifier=verifier, planner=planner)
    ours = generator.generate(**inputs, max_new_tokens=25, do_sample=True, temperature=1e-4)
    assert torch.equal(ours, model.generate(**inputs, max_new_tokens=25, do_sample=False))
