"""The acceptance kernels against their twins, and the twins against the shipped rules, on the same numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from specdec.kernels import reference_rules
from specdec.kernels.accept import accept_path, reject_chain, sample_nodes
from specdec.kernels.reference_rules import Accepted
from specdec.types import Draft, Law, Scores, TokenTree, Verdict
from specdec.verify.coupled import Coupled
from specdec.verify.rejection import TokenRejection
from specdec.verify.sample_and_match import SampleAndMatch
from specdec.verify.walk import accept_matches

pytestmark = pytest.mark.slow

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = [7, 64, 1000, 5003]
# Two chunks and a block that ends in the middle of one.
LONG = 8192 + 1500


class Given:
    """A chooser whose numbers are given: uniforms for accepts, Gumbel noise for picks, shaped as the rule asks."""

    def __init__(self, uniforms: Tensor | None = None, gumbel: Tensor | None = None) -> None:
        self.uniforms, self.gumbel = uniforms, gumbel

    def accept(self, prob: Tensor) -> Tensor:
        assert self.uniforms is not None
        return self.uniforms[:, : prob.shape[1]] < prob

    def pick(self, weights: Tensor) -> Tensor:
        assert self.gumbel is not None
        return (weights.double().log() + self.gumbel).argmax(-1)

    def coupled(self, log_p: Tensor, depth: Tensor) -> Tensor:
        assert self.gumbel is not None
        return (log_p + self.gumbel).argmax(-1)


def _gumbel(*shape: int) -> Tensor:
    return -torch.log(-torch.log(torch.rand(shape, dtype=torch.float64).clamp(1e-12, 1 - 1e-12))).to(DEVICE)


def _tree(sizes: list[int], values: int, *, chain: bool = False) -> TokenTree:
    """Random trees of random tokens, padded as a builder pads; few values make equal siblings and long matches."""
    nodes = max(sizes)
    tokens, parents = torch.zeros(len(sizes), nodes, dtype=torch.long), torch.zeros(len(sizes), nodes, dtype=torch.long)
    parents[:, 0] = -1
    for b, size in enumerate(sizes):
        tokens[b, :size] = torch.randint(values, (size,))
        for n in range(1, size):
            low = n - 1 if chain else max(0, n - 12)
            parents[b, n] = torch.randint(low, n, (1,))
    return TokenTree(tokens.to(DEVICE), parents.to(DEVICE), tuple(sizes), chain and min(sizes) == nodes)


def _sizes(tree: TokenTree) -> Tensor:
    return torch.tensor(tree.num_nodes, device=DEVICE)


def _assert_same(ours: Accepted, theirs: Accepted) -> None:
    for name, mine, other in zip(Accepted._fields, ours, theirs, strict=True):
        assert torch.equal(mine, other), (name, mine, other)


def _assert_verdict(ours: Accepted, verdict: Verdict) -> None:
    assert torch.equal(ours.num_accepted, verdict.num_accepted)
    assert torch.equal(ours.next_token, verdict.next_token)
    if verdict.path is not None:
        assert torch.equal(ours.path, verdict.path)


@pytest.mark.parametrize("chain", [False, True])
@pytest.mark.parametrize("values", [1, 2, 5])
@pytest.mark.parametrize("sizes", [[1], [5], [1, 5, 3], [16, 17], [40], [64, 1, 63], [70], [200, 7]], ids=str)
def test_accept_path(sizes: list[int], values: int, chain: bool) -> None:
    tree = _tree(sizes, values, chain=chain)
    for _ in range(3):
        chosen = torch.randint(-1, values, tree.tokens.shape, device=DEVICE)
        ours = accept_path(tree.tokens, tree.parents, _sizes(tree), chosen)
        _assert_same(ours, reference_rules.accept_path(tree.tokens, tree.parents, _sizes(tree), chosen))
        _assert_verdict(ours, accept_matches(tree, chosen))


def test_every_length_of_a_long_chain() -> None:
    nodes = 1024
    parents = torch.arange(-1, nodes - 1, device=DEVICE).expand(5, nodes)
    chosen = torch.zeros(5, nodes, dtype=torch.long, device=DEVICE)
    counts = [0, 1, 255, 512, 1023]
    for b, count in enumerate(counts):
        chosen[b, count] = 9
    ours = accept_path(torch.zeros_like(chosen), parents, torch.full((5,), nodes, device=DEVICE), chosen)
    assert ours.num_accepted.tolist() == counts
    assert ours.next_token.tolist() == [9] * 5
    steps = torch.arange(1, nodes, device=DEVICE)
    assert torch.equal(ours.path, steps * (steps <= ours.num_accepted[:, None]))


def test_of_equal_siblings_the_deeper_counts_and_then_the_first() -> None:
    tree = TokenTree(
        torch.tensor([[0, 4, 4, 5, 6], [0, 4, 4, 5, 5]], device=DEVICE),
        torch.tensor([[-1, 0, 0, 2, 0], [-1, 0, 0, 1, 2]], device=DEVICE),
        (5, 5),
    )
    chosen = torch.tensor([[4, 5, 5, 7, 1]] * 2, device=DEVICE)
    ours = accept_path(tree.tokens, tree.parents, _sizes(tree), chosen)
    _assert_verdict(ours, accept_matches(tree, chosen))
    assert ours.path.tolist() == [[2, 3, 0, 0], [1, 3, 0, 0]]


def test_padding_never_matches() -> None:
    """Padding holds token 0 below the root, which a target may well choose."""
    tree = _tree([3, 6], 1)
    chosen = torch.zeros_like(tree.tokens)
    ours = accept_path(tree.tokens, tree.parents, _sizes(tree), chosen)
    assert (ours.path[0] < 3).all()
    _assert_verdict(ours, accept_matches(tree, chosen))


def _logits(batch: int, nodes: int, size: int) -> Tensor:
    logits = (torch.randn(batch, nodes, size) * 3).to(DEVICE)
    logits[torch.rand(logits.shape, device=DEVICE) < 0.2] = float("-inf")
    logits[..., 0] = logits[..., 0].clamp(min=-5)
    return logits


@pytest.mark.parametrize("size", [*SIZES, LONG])
@pytest.mark.parametrize(("batch", "nodes"), [(1, 1), (3, 5)])
def test_sample_nodes(batch: int, nodes: int, size: int) -> None:
    logits, gumbel = _logits(batch, nodes, size), _gumbel(batch, nodes, size)
    expected = reference_rules.sample_nodes(logits, gumbel)
    assert torch.equal(sample_nodes(logits, gumbel), expected)
    assert torch.equal(sample_nodes(logits.log_softmax(-1), gumbel), expected)
    assert torch.equal(sample_nodes(logits.softmax(-1), gumbel, weights=True), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sample_nodes_in_half_precision_with_expanded_noise(dtype: torch.dtype) -> None:
    logits, gumbel = _logits(2, 3, 1000).to(dtype), _gumbel(1000).expand(2, 3, 1000)
    assert torch.equal(sample_nodes(logits, gumbel), reference_rules.sample_nodes(logits, gumbel))
    assert torch.equal(sample_nodes(logits, gumbel.float()), reference_rules.sample_nodes(logits, gumbel.float()))


def test_ties_go_to_the_lowest_token() -> None:
    values = torch.zeros(1, 2, LONG, device=DEVICE)
    values[0, 0, 3000] = values[0, 0, 9000] = 1.0
    gumbel = torch.zeros_like(values).double()
    assert sample_nodes(values, gumbel).tolist() == [[3000, 0]]
    assert reference_rules.sample_nodes(values, gumbel).tolist() == [[3000, 0]]
    gumbel[0, 1, 4000] = 1e-14
    assert sample_nodes(values + 1.0, gumbel).tolist() == [[3000, 4000]], "a difference that fp32 does not hold"
    gumbel[0, 1, 4000] = 0.0
    p = torch.full((1, 1, LONG), 0.5, device=DEVICE)
    tokens, size = torch.zeros(1, 1, dtype=torch.long, device=DEVICE), torch.ones(1, dtype=torch.long, device=DEVICE)
    assert reject_chain(p, None, tokens, size, torch.empty(1, 0, device=DEVICE), gumbel[:, 0]).next_token.tolist() == [0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_a_row_without_a_law_gives_minus_one(bad: float) -> None:
    values, gumbel = torch.zeros(1, 2, LONG, device=DEVICE), _gumbel(1, 2, LONG)
    values[0, 1, slice(None) if bad == float("-inf") else slice(9000, 9001)] = bad
    for found in (sample_nodes(values, gumbel), reference_rules.sample_nodes(values, gumbel)):
        assert found[0, 0] >= 0
        assert found[0, 1] == -1


@pytest.mark.parametrize("sizes", [[1], [9, 4, 1]], ids=str)
@pytest.mark.parametrize("size", [7, 1000])
def test_tree_rules_from_the_same_noise(sizes: list[int], size: int) -> None:
    """sample_nodes and then accept_path is the coupled rule, and sample-and-match where weights are given."""
    tree = _tree(sizes, 2)
    logits, gumbel = _logits(len(sizes), max(sizes), size), _gumbel(len(sizes), max(sizes), size)
    gumbel[..., :2] += 6.0
    logits[-1, 0, 3] = float("nan")
    draft, scores, chooser = Draft(tree, Law.DETERMINISTIC), Scores(logits), Given(gumbel=gumbel)
    for rule, chosen in (
        (Coupled(), sample_nodes(logits.log_softmax(-1), gumbel)),
        (SampleAndMatch(), sample_nodes(logits.softmax(-1), gumbel, weights=True)),
    ):
        ours = accept_path(tree.tokens, tree.parents, _sizes(tree), chosen)
        _assert_verdict(ours, rule.verify(draft, scores, chooser))


def _assert_rejection(tree: TokenTree, logits: Tensor, q: Tensor | None, uniforms: Tensor, gumbel: Tensor) -> Accepted:
    """Kernel, twin and rule agree; returns what they agree on."""
    arguments = logits.softmax(-1), q, tree.tokens, _sizes(tree), uniforms, gumbel
    ours = reject_chain(*arguments)
    _assert_same(ours, reference_rules.reject_chain(*arguments))
    law = Law.DETERMINISTIC if q is None else Law.INDEPENDENT
    _assert_verdict(ours, TokenRejection().verify(Draft(tree, law, q), Scores(logits), Given(uniforms, gumbel)))
    return ours


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("size", [*SIZES, LONG])
@pytest.mark.parametrize("sizes", [[1], [5], [2, 7, 1]], ids=str)
def test_reject_chain(sizes: list[int], size: int, given: bool) -> None:
    tree, batch, nodes = _tree(sizes, 3, chain=True), len(sizes), max(sizes)
    logits = _logits(batch, nodes, size)
    logits[..., :3] += 4.0
    q = (logits + torch.randn_like(logits)).softmax(-1) if given else None
    for _ in range(2):
        uniforms = torch.rand(batch, nodes, dtype=torch.float64, device=DEVICE)
        _assert_rejection(tree, logits, q, uniforms, _gumbel(batch, size))


def test_every_number_of_accepted_tokens() -> None:
    tree = _tree([20, 20], 3, chain=True)
    logits = torch.zeros(2, 20, 64, device=DEVICE)
    q = logits.softmax(-1)
    for count in (0, 1, 16, 18, 19):
        uniforms = torch.full((2, 19), 0.5, dtype=torch.float64, device=DEVICE)
        uniforms[0, count:] = 1.0
        found = _assert_rejection(tree, logits, q, uniforms, _gumbel(2, 64))
        assert found.num_accepted.tolist() == [count, 19]


def test_the_edges_of_acceptance() -> None:
    """u = 0 accepts no token of probability 0, u just below 1 accepts all of ratio 1, and u equal to the ratio accepts none."""
    tokens = torch.tensor([[0, 1], [0, 2], [0, 0], [0, 0], [0, 3], [0, 0]], device=DEVICE)
    tree = TokenTree(tokens, torch.tensor([[-1, 0]] * 6, device=DEVICE), (2,) * 6, True)
    p = torch.tensor([0.5, 0.0, 0.25, 0.25], device=DEVICE).expand(6, 2, 4)
    q = torch.tensor([0.5, 0.25, 0.25, 0.0], device=DEVICE).repeat(6, 2, 1)
    q[3, :, 0], q[5, :, 0] = 1.0, 0.125
    uniforms = torch.tensor([[0.0], [1 - 2**-53], [0.25], [0.5], [0.0], [1.0]], dtype=torch.float64, device=DEVICE)
    found = _assert_rejection(tree, p.log(), q, uniforms, _gumbel(6, 4))
    assert found.num_accepted.tolist() == [0, 1, 1, 0, 0, 0]


def test_rows_that_hold_nan() -> None:
    tree = _tree([4, 4, 4], 3, chain=True)
    logits, uniforms = torch.zeros(3, 4, 1000, device=DEVICE), torch.full((3, 4), 0.5, dtype=torch.float64, device=DEVICE)
    q = torch.zeros_like(logits)
    q[..., :3] = 1 / 3
    logits[..., :3] = 20.0
    q[0, 1, 999], q[1, 0, 5] = float("nan"), float("inf")
    logits[2, 2, 7] = float("nan")
    found = _assert_rejection(tree, logits, q, uniforms, _gumbel(3, 1000))
    assert found.num_accepted.tolist() == [1, 0, 2]
    assert found.next_token[2] == -1
    assert (found.next_token[:2] >= 0).all()


def test_no_residual_draws_from_the_target() -> None:
    """A uniform of 1 rejects although p equals q, as rounding may do elsewhere."""
    tree = _tree([3], 1, chain=True)
    logits = torch.zeros(1, 3, 64, device=DEVICE)
    uniforms = torch.ones(1, 2, dtype=torch.float64, device=DEVICE)
    found = _assert_rejection(tree, logits, logits.softmax(-1), uniforms, _gumbel(1, 64))
    assert found.num_accepted.tolist() == [0]


def test_views_of_larger_tensors() -> None:
    whole = torch.randn(3, 6, 128, device=DEVICE)
    logits, gumbel = whole[:2, 1:5, 20:84], _gumbel(2, 4, 80)[..., 8:72]
    assert torch.equal(sample_nodes(logits, gumbel), reference_rules.sample_nodes(logits, gumbel))
    p = whole.softmax(-1)[:2, 1:5, 20:84]
    tree, uniforms = _tree([4, 4], 64, chain=True), torch.full((2, 9), 0.4, device=DEVICE)
    arguments = p, p.roll(1, 1), tree.tokens, _sizes(tree), uniforms, gumbel[:, 0]
    _assert_same(reject_chain(*arguments), reference_rules.reject_chain(*arguments))
