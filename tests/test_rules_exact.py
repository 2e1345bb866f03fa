"""Losslessness by exact enumeration of the rules that ship, in float64; and the known mistakes, which must be seen."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from specdec.types import Draft, Law, TokenTree
from specdec.verify.compatibility import Rule
from specdec.verify.greedy import Greedy
from specdec.verify.rejection import TokenRejection
from specdec.verify.sample_and_match import SampleAndMatch
from specdec.verify.typical import TypicalLossy
from tests.support_enumeration import (
    Law1,
    Replay,
    Table,
    continue_law,
    draw_chain,
    enumerate_all,
    extend,
    joint,
    scores_of,
    total_variation,
)

EXACT = 1e-12
TYPICAL = TypicalLossy(epsilon=0.3, delta=0.9)
KINDS = ["random", "zeros", "one-hot"]


def _law(rule: Rule, p: Table, q: Table, counts: tuple[int, ...], rounds: int, requests: int = 1) -> tuple[Law1, Law1]:
    """The law of the first tokens of every request after some rounds, completed by p; and p's own."""
    length = rounds * (max(counts) + 1)

    def run(replay: Replay) -> Law1:
        contexts: list[tuple[int, ...]] = [(b,) for b in range(requests)]
        for _ in range(rounds):
            draft = draw_chain(q, contexts, counts, replay)
            contexts = extend(contexts, draft.tree, rule.verify(draft, scores_of(p, contexts, draft.tree), replay))
        return joint([continue_law(p, c, length + 1) for c in contexts])

    return enumerate_all(run), joint([continue_law(p, (b,), length + 1) for b in range(requests)])


@pytest.mark.parametrize("kind_q", KINDS)
@pytest.mark.parametrize("kind_p", KINDS)
@pytest.mark.parametrize("rule", [TokenRejection(), SampleAndMatch()], ids=lambda r: r.name)
def test_two_rounds_of_a_chain(rule: Rule, kind_p: str, kind_q: str) -> None:
    ours, exact = _law(rule, Table(2, 1, kind_p), Table(2, 2, kind_q), (2,), rounds=2)
    assert total_variation(ours, exact) < EXACT


@pytest.mark.parametrize("rule", [TokenRejection(), SampleAndMatch()], ids=lambda r: r.name)
def test_a_chain_over_three_tokens(rule: Rule) -> None:
    ours, exact = _law(rule, Table(3, 5), Table(3, 6), (2,), rounds=1)
    assert total_variation(ours, exact) < EXACT
    assert abs(sum(ours.values()) - 1) < EXACT


@pytest.mark.parametrize("counts", [(1, 1), (1, 0)], ids=str)
@pytest.mark.parametrize("rule", [TokenRejection(), SampleAndMatch()], ids=lambda r: r.name)
def test_two_requests_over_two_rounds(rule: Rule, counts: tuple[int, ...]) -> None:
    ours, exact = _law(rule, Table(2, 3), Table(2, 4), counts, rounds=2, requests=2)
    assert total_variation(ours, exact) < EXACT


@pytest.mark.parametrize("rule", [TokenRejection(), SampleAndMatch()], ids=lambda r: r.name)
def test_draft_equal_to_target(rule: Rule) -> None:
    p = Table(2, 7)
    ours, exact = _law(rule, p, p, (2,), rounds=1)
    assert total_variation(ours, exact) < EXACT


def _tree_law(rule: Rule, p: Table, tree: TokenTree, depth: int) -> tuple[Law1, Law1]:
    draft = Draft(tree, Law.DETERMINISTIC)

    def run(replay: Replay) -> Law1:
        contexts = extend([(0,)], tree, rule.verify(draft, scores_of(p, [(0,)], tree), replay))
        return continue_law(p, contexts[0], depth + 2)

    return enumerate_all(run), continue_law(p, (0,), depth + 2)


@pytest.mark.parametrize("parents", [[-1, 0, 0, 1, 2], [-1, 0, 1, 1], [-1, 0, 0, 0]], ids=str)
def test_sample_and_match_on_deterministic_trees(parents: list[int]) -> None:
    tokens = {4: [0, 1, 2, 0], 5: [0, 1, 2, 1, 0]}[len(parents)]
    tree = TokenTree(torch.tensor([tokens]), torch.tensor([parents]), (len(parents),))
    ours, exact = _tree_law(SampleAndMatch(), Table(3, 8), tree, 2)
    assert total_variation(ours, exact) < EXACT


def test_rejection_takes_a_deterministic_chain_as_one_hot() -> None:
    tree = TokenTree(torch.tensor([[0, 1, 0]]), torch.tensor([[-1, 0, 1]]), (3,), True)
    ours, exact = _tree_law(TokenRejection(), Table(3, 9), tree, 2)
    assert total_variation(ours, exact) < EXACT


@pytest.mark.parametrize("seed", range(20))
def test_greedy_is_the_argmax_path_of_any_tree(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    p, nodes = Table(3, seed), 9
    parents = [-1] + [int(torch.randint(n, (1,), generator=generator)) for n in range(1, nodes)]
    tokens = torch.randint(3, (1, nodes), generator=generator)
    tree = TokenTree(tokens, torch.tensor([parents]), (nodes,))
    draft = Draft(tree, Law.DETERMINISTIC)
    out = extend([(0,)], tree, Greedy().verify(draft, scores_of(p, [(0,)], tree), Replay([])))[0]
    text: tuple[int, ...] = (0,)
    while len(text) < len(out):
        text = (*text, int(p(text).argmax()))
    assert out == text


def test_acceptance_is_one_minus_the_total_variation() -> None:
    p, q = Table(3, 11), Table(3, 12)

    def run(replay: Replay) -> tuple[int, ...]:
        draft = draw_chain(q, [(0,)], (1,), replay)
        return (int(TokenRejection().verify(draft, scores_of(p, [(0,)], draft.tree), replay).num_accepted),)

    overlap = float(torch.minimum(p((0,)), q((0,))).sum())
    assert abs(enumerate_all(run)[(1,)] - overlap) < EXACT


def _broken_law(change: str) -> float:
    """The error of a chain of one token when the draft breaks a rule of the draw."""
    p, q = Table(3, 21), Table(3, 22)

    def run(replay: Replay) -> Law1:
        context = [(0,)]
        draft = draw_chain(q, context, (1,), replay)
        token, row = int(draft.tree.tokens[0, 1]), q((0,))
        if change == "raw q":  # drawn from q, verified against another temperature's q
            draft = replace(draft, q=(draft.q**0.5) / (draft.q**0.5).sum(-1, keepdim=True))  # type: ignore[operator]
        if change == "argmax draw":  # drawn by argmax, verified against the softmax
            draft.tree.tokens[0, 1] = row.argmax()
        if change == "dropped" and row[token] < row.max():  # dropped for what was drawn
            tree = TokenTree(draft.tree.tokens[:, :1], draft.tree.parents[:, :1], (1,), True)
            draft = Draft(tree, Law.INDEPENDENT, draft.q[:, :1])  # type: ignore[index]
        verdict = TokenRejection().verify(draft, scores_of(p, context, draft.tree), replay)
        return continue_law(p, extend(context, draft.tree, verdict)[0], 3)

    return total_variation(enumerate_all(run), continue_law(p, (0,), 3))


def test_the_unbroken_rule_passes_the_same_harness() -> None:
    assert _broken_law("nothing") < EXACT


@pytest.mark.parametrize("change", ["raw q", "argmax draw", "dropped"])
def test_known_mistakes_are_seen(change: str) -> None:
    assert _broken_law(change) > 1e-3


def test_dropping_drawn_tokens_is_harmless_to_sample_and_match() -> None:
    p, q = Table(3, 21), Table(3, 22)

    def run(replay: Replay) -> Law1:
        draft = draw_chain(q, [(0,)], (1,), replay)
        row = q((0,))
        if row[int(draft.tree.tokens[0, 1])] < row.max():
            tree = TokenTree(draft.tree.tokens[:, :1], draft.tree.parents[:, :1], (1,), True)
            draft = Draft(tree, Law.INDEPENDENT, None, post_draw=True)
        verdict = SampleAndMatch().verify(draft, scores_of(p, [(0,)], draft.tree), replay)
        return continue_law(p, extend([(0,)], draft.tree, verdict)[0], 3)

    assert total_variation(enumerate_all(run), continue_law(p, (0,), 3)) < EXACT


def _typical(p: Table, tree: TokenTree, node: int) -> bool:
    """Whether typical acceptance keeps a node, by its definition; node 0 always."""
    if node == 0:
        return True
    parent = int(tree.parents[0, node])
    path, at = [], parent
    while at > 0:
        path.append(int(tree.tokens[0, at]))
        at = int(tree.parents[0, at])
    law = p((0, *reversed(path)))
    entropy = -sum(v * math.log(v + 1e-5) for v in law.tolist())
    asked = min(TYPICAL.epsilon, TYPICAL.delta * math.exp(-entropy))
    return float(law[tree.tokens[0, node]]) > asked and _typical(p, tree, parent)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_typical_acceptance_keeps_what_its_definition_keeps_and_then_draws_from_the_target(seed: int) -> None:
    p = Table(4, seed)
    tokens, parents = torch.tensor([[0, 1, 2, 3, 0, 1, 2]]), torch.tensor([[-1, 0, 0, 1, 1, 2, 3]])
    tree = TokenTree(tokens, parents, (7,))
    texts: list[tuple[int, ...]] = [()]
    for node in range(1, 7):
        texts.append((*texts[int(parents[0, node])], int(tokens[0, node])))
    best = max((text for node, text in enumerate(texts) if _typical(p, tree, node)), key=len)
    draft = Draft(tree, Law.DETERMINISTIC)
    law = enumerate_all(lambda replay: extend([(0,)], tree, TYPICAL.verify(draft, scores_of(p, [(0,)], tree), replay))[0])
    wanted = {(0, *best, token): weight for token, weight in enumerate(p((0, *best)).tolist())}
    assert total_variation(law, wanted) < EXACT


def test_typical_acceptance_is_not_lossless_and_says_so() -> None:
    assert not TYPICAL.lossless
    ours, exact = _law(TYPICAL, Table(2, 1), Table(2, 2), (2,), rounds=1)
    assert total_variation(ours, exact) > 0.01
