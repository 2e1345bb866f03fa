"""The loss kernel against the divergences that define it, at odd sizes, in every dtype."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from specdec.kernels.fused_loss import KINDS, LossRows, fused_loss
from specdec.training import divergences
from specdec.training.divergences import Divergence, Kind, RowLoss, row_loss

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# A block that ends in the middle, and more than one.
LONG = 4096 + 903
ROWS = 3
SCALES = (1.0, 0.25, 3.0)
# fp32 sums of thousands of terms in another order, and the fast exponential of a GPU, on logits of a deviation of 3.
FP32_ERROR = 5e-5
# A unit in the last place of bf16: the interpreter cuts off what a GPU rounds.
BF16_ERROR = 2**-7


def _pair(kind: Kind, size: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    logits, other = ((torch.randn(ROWS, size) * 3).to(DEVICE, dtype) for _ in range(2))
    return logits, torch.randint(size, (ROWS,), device=DEVICE) if kind == "ce" else other


def _scales() -> Tensor:
    return torch.tensor(SCALES, device=DEVICE)


def _expected(divergence: Divergence, logits: Tensor, target: Tensor) -> tuple[RowLoss, Tensor]:
    leaf = logits.double().requires_grad_()
    found = row_loss(divergence, leaf, target if divergence.kind == "ce" else target.double())
    (gradient,) = torch.autograd.grad((found.loss * _scales()).sum(), leaf)
    return found, gradient


def _run(divergence: Divergence, logits: Tensor, target: Tensor, *, gradient: bool = True) -> LossRows:
    return fused_loss(
        logits,
        target,
        _scales(),
        kind=divergence.kind,
        temperature=divergence.temperature,
        beta=divergence.beta,
        decay=divergence.decay,
        gradient=gradient,
    )


def _assert_close(ours: Tensor, theirs: Tensor, error: float) -> None:
    size = theirs.abs().max().clamp(min=1.0)
    assert (ours.double() - theirs).abs().max() <= error * size, (ours, theirs)


def test_kernel_and_definition_know_the_same_divergences() -> None:
    assert KINDS == divergences.KINDS


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("size", [1, 7, 1000, LONG])
@pytest.mark.parametrize("kind", KINDS)
def test_against_the_definition(kind: Kind, size: int, temperature: float) -> None:
    divergence = Divergence(kind, temperature, beta=0.3, decay=2.0)
    logits, target = _pair(kind, size)
    expected, gradient = _expected(divergence, logits, target)
    before = target.clone()
    found = _run(divergence, logits, target)
    _assert_close(found.loss, expected.loss.detach(), FP32_ERROR)
    _assert_close(found.acceptance, expected.acceptance, FP32_ERROR)
    _assert_close(logits, gradient, FP32_ERROR)
    assert torch.equal(found.matched, expected.matched)
    assert torch.equal(target, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision(kind: Kind, dtype: torch.dtype) -> None:
    logits, target = _pair(kind, LONG, dtype)
    expected, gradient = _expected(Divergence(kind), logits, target)
    found = _run(Divergence(kind), logits, target)
    assert found.loss.dtype == torch.float32
    _assert_close(found.loss, expected.loss.detach(), FP32_ERROR)
    assert torch.equal(found.matched, expected.matched)
    _assert_close(logits, gradient, BF16_ERROR)


@pytest.mark.parametrize("kind", KINDS)
def test_without_gradient_the_logits_stay(kind: Kind) -> None:
    logits, target = _pair(kind, 1000)
    before = logits.clone()
    alone = _run(Divergence(kind), logits, target, gradient=False)
    assert torch.equal(logits, before)
    for ours, theirs in zip(alone, _run(Divergence(kind), logits, target), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_views_write_nothing_beside_them(kind: Kind) -> None:
    whole, target = torch.randn(2 * ROWS, 150, device=DEVICE), _pair(kind, 100)[1]
    before, view = whole.clone(), whole[::2, 20:120]
    other = target if kind == "ce" else torch.nn.functional.pad(target, (3, 4))[:, 3:103]
    _, gradient = _expected(Divergence(kind), view, target)
    _run(Divergence(kind), view, other)
    _assert_close(view, gradient, FP32_ERROR)
    whole[::2, 20:120] = before[::2, 20:120]
    assert torch.equal(whole, before)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_that_neither_law_has_change_nothing(kind: Kind) -> None:
    logits, target = _pair(kind, 1000)
    expected, gradient = _expected(Divergence(kind), logits, target)
    wide, other = (
        values if values.dim() == 1 else torch.nn.functional.pad(values, (0, 9), value=float("-inf")) for values in (logits, target)
    )
    found = _run(Divergence(kind), wide, other)
    _assert_close(found.loss, expected.loss.detach(), FP32_ERROR)
    _assert_close(wide[:, :1000], gradient, FP32_ERROR)
    assert (wide[:, 1000:] == 0).all()


def test_the_lowest_of_equal_tokens_is_the_most_probable() -> None:
    logits, other = torch.zeros(ROWS, LONG, device=DEVICE), torch.zeros(ROWS, LONG, device=DEVICE)
    logits[0, [30, 4500]] = other[0, 30] = 1.0
    logits[1, [30, 4500]] = other[1, 4500] = 1.0
    assert _run(Divergence("tv"), logits, other).matched.tolist() == [True, False, True]


def test_a_row_that_holds_nan_has_no_loss_and_spoils_no_other() -> None:
    logits, target = _pair("forward_kl", 1000)
    logits[1, 7] = float("nan")
    found = _run(Divergence("forward_kl"), logits, target)
    assert found.loss.isnan().tolist() == [False, True, False]


def test_no_rows() -> None:
    empty = torch.empty(0, 50, device=DEVICE)
    found = fused_loss(empty, empty.clone(), torch.empty(0, device=DEVICE), kind="tv")
    assert [len(column) for column in found] == [0, 0, 0]
