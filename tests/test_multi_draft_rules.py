"""The rules for several children of a node: exact by enumeration in float64, and every known way to break them is seen."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from specdec.kernels.transfer import on_device
from specdec.noise import Noise, Stream
from specdec.types import Draft, Law, Scores, TokenTree
from specdec.verify import recursive, traversal
from specdec.verify.chooser import NoiseChooser
from specdec.verify.compatibility import Rule
from specdec.verify.k_sequential import KSequential, threshold
from specdec.verify.multi_path_block import MultiPathBlock
from specdec.verify.recursive import Recursive, RecursiveWithoutReplacement
from specdec.verify.rejection import TokenRejection
from specdec.verify.traversal import Traversal
from tests.support_enumeration import (
    Replays,
    Table,
    draw_tree,
    drawing,
    expected_acceptance,
    law_error,
)

EXACT = 1e-12
INDEPENDENT: list[Rule] = [Recursive(), KSequential(), Traversal(), MultiPathBlock()]
WITHOUT: list[Rule] = [RecursiveWithoutReplacement(), Traversal()]
PAIRS = [(rule, False) for rule in INDEPENDENT] + [(rule, True) for rule in WITHOUT]
IDS = [f"{rule.name}-{'without' if without else 'independent'}" for rule, without in PAIRS]
every_rule = pytest.mark.parametrize(("rule", "without"), PAIRS, ids=IDS)
FORK = (-1, 0, 0)
THREE = (-1, 0, 0, 0)
# Two paths side by side, one tree whose nodes come depth first, and one with a leaf above its deepest nodes.
DEEP, DEPTH_FIRST, RAGGED = (-1, 0, 0, 1, 2), (-1, 0, 1, 0, 3), (-1, 0, 1, 0, 1)
Shapes = tuple[tuple[int, ...], ...]


@pytest.mark.parametrize("kind_q", ["random", "zeros", "one-hot"])
@pytest.mark.parametrize("kind_p", ["random", "zeros", "one-hot"])
@every_rule
def test_children_of_one_node(rule: Rule, without: bool, kind_p: str, kind_q: str) -> None:
    p, q = Table(3, 1, kind_p), Table(3, 2, kind_q)
    assert law_error(rule.verify, drawing(q, (FORK,), without), p, 1, 1, 2) < EXACT


@every_rule
def test_two_rounds(rule: Rule, without: bool) -> None:
    p, q = Table(3, 1), Table(3, 2, "zeros")
    assert law_error(rule.verify, drawing(q, (FORK,), without), p, 1, 2, 3) < EXACT


@pytest.mark.parametrize("shape", [THREE, DEEP, DEPTH_FIRST, RAGGED], ids=str)
@every_rule
def test_wider_and_deeper_trees(rule: Rule, without: bool, shape: tuple[int, ...]) -> None:
    assert law_error(rule.verify, drawing(Table(2, 4), (shape,), without), Table(2, 3), 1, 1, 3) < EXACT


@pytest.mark.parametrize(
    ("shapes", "rounds"), [((FORK, (-1, 0)), 1), (((-1,), FORK), 2), (((-1, 0, 1), (-1,)), 2)], ids=["fork", "root", "chain"]
)
@every_rule
def test_two_requests_of_different_trees(rule: Rule, without: bool, shapes: Shapes, rounds: int) -> None:
    assert law_error(rule.verify, drawing(Table(2, 6), shapes, without), Table(2, 5), 2, rounds, 2) < EXACT


@pytest.mark.parametrize("rule", [Recursive(), RecursiveWithoutReplacement(), Traversal()], ids=lambda r: r.name)
def test_deterministic_trees_with_equal_siblings(rule: Rule) -> None:
    tree = TokenTree(torch.tensor([[0, 1, 2, 1, 0]]), torch.tensor([[-1, 0, 0, 0, 2]]), (5,))

    def draw(texts: list[tuple[int, ...]], replays: Replays) -> Draft:
        rows = len(texts)
        own = TokenTree(tree.tokens.expand(rows, -1), tree.parents.expand(rows, -1), tree.num_nodes * rows)
        return Draft(own, Law.DETERMINISTIC)

    assert law_error(rule.verify, draw, Table(3, 8), 1, 1, 3) < EXACT


@every_rule
def test_a_draft_equal_to_the_target_is_accepted_to_a_leaf(rule: Rule, without: bool) -> None:
    p = Table(2, 7)
    found = expected_acceptance(rule.verify, drawing(p, ((-1, 0, 0, 1, 1),), without), p)
    first = expected_acceptance(rule.verify, drawing(p, ((-1, 0),), without), p)
    assert abs(first - 1) < EXACT
    assert found > 1 - EXACT


def _overlap(p: Tensor, q: Tensor) -> float:
    return float(torch.minimum(p, q).sum())


@pytest.mark.parametrize("children", [1, 2, 3])
def test_recursive_acceptance_is_its_closed_form(children: int) -> None:
    p, q = Table(3, 11), Table(3, 12)
    here, law, refused = p((0,)), q((0,)), 1.0
    for _ in range(children):
        refused *= 1 - _overlap(here, law)
        here = (here - law).clamp(min=0) / (here - law).clamp(min=0).sum()
    shape = (-1,) + (0,) * children
    found = expected_acceptance(Recursive().verify, drawing(q, (shape,), False), p)
    assert abs(found - (1 - refused)) < EXACT


@pytest.mark.parametrize("children", [1, 2, 3])
def test_k_sequential_acceptance_is_its_closed_form_and_its_threshold_is_tight(children: int) -> None:
    p, q = Table(3, 11), Table(3, 12)
    rho = float(threshold(p((0,)), q((0,)), torch.tensor(children)))
    beta = float(torch.minimum(p((0,)) / rho, q((0,))).sum())
    some = 1 - (1 - beta) ** children
    assert some <= rho * beta + EXACT
    assert abs(some - rho * beta) < 1e-6
    shape = (-1,) + (0,) * children
    assert abs(expected_acceptance(KSequential().verify, drawing(q, (shape,), False), p) - some) < EXACT


def test_repeated_draws_are_worth_more_than_passed_over() -> None:
    p, q = Table(4, 101), Table(4, 201)
    told = expected_acceptance(RecursiveWithoutReplacement().verify, drawing(q, (FORK,), told=Law.WITHOUT_REPLACEMENT), p)
    assert expected_acceptance(Recursive().verify, drawing(q, (FORK,), False), p) > told + 1e-3


@pytest.mark.parametrize("seed", range(4))
def test_traversal_keeps_at_least_what_recursive_rejection_keeps(seed: int) -> None:
    p, q = Table(2, 40 + seed), Table(2, 50 + seed)
    for rule, without in ((Recursive(), False), (RecursiveWithoutReplacement(), True)):
        draw = drawing(q, (RAGGED,), without)
        assert expected_acceptance(Traversal().verify, draw, p) > expected_acceptance(rule.verify, draw, p) - EXACT


def _dropping(q: Table):  # type: ignore[no-untyped-def]
    """Draws two children without replacement and drops the second where its own q is of the lower half: after the draw."""

    def draw(texts: list[tuple[int, ...]], replays: Replays) -> Draft:
        draft = draw_tree(q, texts, (FORK,), replays, without=True)
        assert draft.q is not None
        own = draft.q[:, 0].gather(1, draft.tree.tokens[:, 2:])[:, 0]
        sizes = tuple([3 if kept else 2 for kept in (own > draft.q[:, 0].median(1).values).tolist()])
        return replace(draft, tree=replace(draft.tree, num_nodes=sizes))

    return draw


@pytest.mark.parametrize("rule", [RecursiveWithoutReplacement(), Traversal()], ids=lambda r: r.name)
def test_dropping_children_for_what_was_drawn_is_seen(rule: Rule) -> None:
    assert law_error(rule.verify, _dropping(Table(4, 201)), Table(4, 101), 1, 1, 1) > 1e-2


@pytest.mark.parametrize("rule", [Recursive(), KSequential(), MultiPathBlock()], ids=lambda r: r.name)
def test_draws_without_replacement_told_as_independent_are_seen(rule: Rule) -> None:
    assert law_error(rule.verify, drawing(Table(4, 201), (FORK,), True, told=Law.INDEPENDENT), Table(4, 101), 1, 1, 1) > 1e-2


@pytest.mark.parametrize("rule", [RecursiveWithoutReplacement(), Traversal()], ids=lambda r: r.name)
def test_repeated_draws_that_are_judged_by_what_is_left_of_q_are_seen(rule: Rule, monkeypatch: pytest.MonkeyPatch) -> None:
    p, draw = Table(4, 101), drawing(Table(4, 201), (FORK,), told=Law.WITHOUT_REPLACEMENT)
    assert law_error(rule.verify, draw, p, 1, 1, 1) < EXACT
    # So little is left of a refused token that a repeated one is refused, but not passed over.
    for module in (recursive, traversal):
        monkeypatch.setattr(module, "without_token", lambda law, token: recursive.normalised(law.scatter(1, token, 1e-200), law))
    assert law_error(rule.verify, draw, p, 1, 1, 1) > 1e-3


@pytest.mark.parametrize("rule", [RecursiveWithoutReplacement(), Traversal()], ids=lambda r: r.name)
def test_soft_q_for_the_likeliest_children_is_seen(rule: Rule) -> None:
    q = Table(3, 22)

    def draw(texts: list[tuple[int, ...]], replays: Replays) -> Draft:
        draft = draw_tree(q, texts, (FORK,), replays, without=True)
        assert draft.q is not None
        draft.tree.tokens[:, 1:] = draft.q[:, 0].topk(2, dim=1).indices
        return draft

    assert law_error(rule.verify, draw, Table(3, 21), 1, 1, 2) > 1e-2


@pytest.mark.parametrize("weight", ["kept", "bare excess"])
def test_another_weight_after_a_refusal_is_seen(weight: str, monkeypatch: pytest.MonkeyPatch) -> None:
    p, draw = Table(3, 101), drawing(Table(3, 201), ((-1, 0, 1, 1),), True)
    assert law_error(Traversal().verify, draw, p, 1, 1, 2) < EXACT
    broken = {"kept": lambda w, excess: w, "bare excess": lambda w, excess: torch.where(w < 1, excess, 1.0)}
    monkeypatch.setattr(traversal, "_after_refusal", broken[weight])
    assert law_error(Traversal().verify, draw, p, 1, 1, 2) > 1e-2


class Script:
    """A chooser with the same uniform for the same drafted node of a chain, however a rule asks, and one set of Gumbel noise."""

    def __init__(self, seed: int, batch: int, drafted: int, vocabulary: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._uniform = torch.rand(batch, drafted, generator=generator, dtype=torch.float64)
        self._gumbel = -torch.rand(batch, vocabulary, generator=generator, dtype=torch.float64).log().neg().log()
        self._next = 0

    def accept(self, prob: Tensor) -> Tensor:
        if prob.dim() == 1:
            self._next += 1
            return self._uniform[:, self._next - 1] < prob
        # Where node 0 is asked about too its probability is 0.
        return torch.nn.functional.pad(self._uniform, (prob.shape[1] - self._uniform.shape[1], 0), value=1.0) < prob

    def pick(self, weights: Tensor) -> Tensor:
        return (weights.double().log() + self._gumbel).argmax(-1)

    def coupled(self, log_p: Tensor, depth: Tensor) -> Tensor:
        raise NotImplementedError


def _random_draft(seed: int, batch: int, parents: list[int], vocabulary: int, law: Law) -> tuple[Draft, Scores]:
    generator = torch.Generator().manual_seed(seed)
    nodes = len(parents)
    logits = torch.randn(2, batch, nodes, vocabulary, generator=generator)
    tokens = torch.randint(vocabulary, (batch, nodes), generator=generator)
    sizes = tuple([nodes - b % 2 for b in range(batch)])
    tree = TokenTree(tokens, torch.tensor([parents] * batch), sizes)
    return Draft(tree, law, logits[0].softmax(-1)), Scores(logits[1])


@pytest.mark.parametrize("rule", [Recursive(), RecursiveWithoutReplacement(), KSequential()], ids=lambda r: r.name)
@pytest.mark.parametrize("promised", [True, False], ids=["chain", "tree of one child"])
def test_one_child_is_token_rejection_decision_for_decision(rule: Rule, promised: bool) -> None:
    draft, scores = _random_draft(3, 64, [-1, 0, 1, 2], 5, min(rule.laws - {Law.DETERMINISTIC}))
    scores = Scores(scores.logits.double())
    chain = replace(draft, tree=replace(draft.tree, is_chain=True))
    wanted = TokenRejection().verify(chain, scores, Script(1, 64, 3, 5))
    found = rule.verify(chain if promised else draft, scores, Script(1, 64, 3, 5))
    assert torch.equal(found.num_accepted, wanted.num_accepted)
    assert torch.equal(found.next_token, wanted.next_token)
    assert len(set(wanted.num_accepted.tolist())) > 2


@every_rule
def test_a_request_is_verified_as_it_would_be_alone(rule: Rule, without: bool) -> None:
    law = Law.WITHOUT_REPLACEMENT if without else Law.INDEPENDENT
    draft, scores = _random_draft(5, 16, [-1, 0, 0, 1, 1, 2], 6, law)
    requests, starts = on_device([list(range(16)), [7] * 16], scores.logits.device)
    together = rule.verify(draft, scores, NoiseChooser(Noise(1), requests, starts, Stream.ACCEPT))
    assert draft.q is not None
    assert together.path is not None
    for b in range(16):
        size = draft.tree.num_nodes[b]
        tree = TokenTree(draft.tree.tokens[b : b + 1], draft.tree.parents[b : b + 1], (size,))
        alone = replace(draft, tree=tree, q=draft.q[b : b + 1])
        chooser = NoiseChooser(Noise(1), requests[b : b + 1], starts[b : b + 1], Stream.ACCEPT)
        own = rule.verify(alone, Scores(scores.logits[b : b + 1]), chooser)
        assert int(own.num_accepted) == int(together.num_accepted[b])
        assert int(own.next_token) == int(together.next_token[b])
        path = together.path[b, : int(own.num_accepted)].tolist()
        assert draft.tree.parents[b, path].tolist() == [0, *path][: len(path)]
        assert all(node < size for node in path)


def _chooser(batch: int) -> NoiseChooser:
    requests, starts = on_device([list(range(batch)), [3] * batch], torch.device("cpu"))
    return NoiseChooser(Noise(4), requests, starts, Stream.ACCEPT)


@every_rule
def test_a_row_of_nan_shows_only_where_it_is_reached(rule: Rule, without: bool) -> None:
    law = Law.WITHOUT_REPLACEMENT if without else Law.INDEPENDENT
    draft, scores = _random_draft(5, 64, [-1, 0, 0, 1, 1], 4, law)
    logits = scores.logits.clone()
    logits[:, 1] = float("nan")
    verdict = rule.verify(draft, Scores(logits), _chooser(64))
    assert verdict.path is not None
    reached = (verdict.num_accepted == 1) & (verdict.path[:, 0] == 1)
    assert reached.any()
    assert not reached.all()
    assert torch.equal(verdict.next_token == -1, reached)
    logits[:, 0] = float("nan")
    verdict = rule.verify(draft, Scores(logits), _chooser(64))
    assert not verdict.num_accepted.any()
    assert (verdict.next_token == -1).all()


@every_rule
def test_behind_a_q_that_is_no_number_the_target_draws_alone(rule: Rule, without: bool) -> None:
    law = Law.WITHOUT_REPLACEMENT if without else Law.INDEPENDENT
    draft, scores = _random_draft(6, 8, [-1, 0, 0, 1, 1], 4, law)
    assert draft.q is not None
    verdict = rule.verify(replace(draft, q=draft.q * float("nan")), scores, _chooser(8))
    assert not verdict.num_accepted.any()
    assert (verdict.next_token >= 0).all()


@pytest.mark.slow
@every_rule
def test_no_decision_waits_for_a_value(rule: Rule, without: bool) -> None:
    law = Law.WITHOUT_REPLACEMENT if without else Law.INDEPENDENT
    # Fake tensors have shapes and no values: whatever reads one, as a synchronisation would, raises.
    with FakeTensorMode():
        draft, scores = _random_draft(6, 8, [-1, 0, 0, 1, 1], 4, law)
        verdict = rule.verify(draft, scores, _chooser(8))
        assert verdict.next_token.shape == verdict.num_accepted.shape == (8,)
        with pytest.raises(DataDependentOutputException):
            verdict.next_token[0].item()


@every_rule
def test_a_tree_of_one_node_is_plain_sampling(rule: Rule, without: bool) -> None:
    assert law_error(rule.verify, drawing(Table(3, 2), ((-1,),), without), Table(3, 1), 1, 1, 2) < EXACT
