"""Chunked losses against the unchunked definition, what they allocate and multiply, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from specdec.errors import SpecDecError
from specdec.training.divergences import KINDS, Divergence, Kind, row_loss
from specdec.training.losses import ChunkedLoss, chunked_loss

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

ROWS, WIDTH, TEACHER_WIDTH, SIZE = 23, 6, 9, 50
# Sums of fp32 in another order.
FP32_ERROR = 1e-6
# The kernel's sums too: KL terms are differences of logarithms of size 10.
FUSED_ERROR = 1e-5
# Logits and their gradients are rounded to bf16, once.
BF16_ERROR = 2**-7


class Inputs:
    """Hidden states and heads of a draft and its teacher."""

    def __init__(self, kind: Kind, dtype: torch.dtype = torch.float64, rows: int = ROWS) -> None:
        self.divergence = Divergence(kind, temperature=1.2, beta=0.4)
        self.hidden = torch.randn(rows, WIDTH, dtype=torch.float64).to(dtype).requires_grad_()
        self.head = torch.randn(SIZE, WIDTH, dtype=torch.float64).to(dtype).requires_grad_()
        self.teacher_hidden = torch.randn(rows, TEACHER_WIDTH, dtype=torch.float64).to(dtype)
        self.teacher_head = torch.randn(SIZE, TEACHER_WIDTH, dtype=torch.float64).to(dtype)
        self.labels = torch.randint(SIZE, (rows,))
        self.weights = torch.rand(rows, dtype=torch.float64) * (torch.rand(rows) < 0.7)

    @property
    def target(self) -> dict[str, Tensor]:
        if self.divergence.kind == "ce":
            return {"labels": self.labels}
        return {"teacher_hidden": self.teacher_hidden, "teacher_head_weight": self.teacher_head}

    def chunked(self, **given: Any) -> ChunkedLoss:
        given = {"weights": self.weights, "chunk_rows": 5, "divergence": self.divergence} | self.target | given
        return chunked_loss(self.hidden, self.head, **given)

    def whole(self) -> Tensor:
        """The loss from all logits at once."""
        logits = self.hidden @ self.head.T
        target = self.labels if self.divergence.kind == "ce" else self.teacher_hidden @ self.teacher_head.T
        loss = row_loss(self.divergence, logits, target).loss
        return (loss * self.weights).sum() / self.weights.sum()

    def gradients(self, loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, (self.hidden, self.head))


def _assert_close(ours: Tensor, theirs: Tensor, error: float) -> None:
    assert ours.shape == theirs.shape
    assert (ours.double() - theirs.double()).abs().max() <= error * theirs.double().abs().max().clamp(min=1.0), (ours, theirs)


@pytest.mark.parametrize("chunk_rows", [1, 5, ROWS, 100])
@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_the_unchunked_definition(kind: Kind, chunk_rows: int) -> None:
    for dtype, error in ((torch.float64, 1e-12), (torch.float32, FP32_ERROR)):
        inputs = Inputs(kind, dtype)
        ours, theirs = inputs.chunked(chunk_rows=chunk_rows).loss, inputs.whole()
        _assert_close(ours, theirs, error)
        for mine, other in zip(inputs.gradients(3 * ours), inputs.gradients(3 * theirs), strict=True):
            assert mine.dtype == dtype
            _assert_close(mine, other, error)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "hybrid"])
def test_gradients_by_finite_differences(kind: Kind) -> None:
    inputs, few = Inputs(kind, rows=5), 9
    inputs.labels, inputs.teacher_head = inputs.labels % few, inputs.teacher_head[:few]
    head = inputs.head.detach()[:few].requires_grad_()

    def loss(hidden: Tensor, head: Tensor) -> Tensor:
        given = {"weights": inputs.weights, "chunk_rows": 3, "divergence": inputs.divergence} | inputs.target
        return chunked_loss(hidden, head, **given).loss

    assert torch.autograd.gradcheck(loss, (inputs.hidden, head))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_fused_is_eager(kind: Kind, dtype: torch.dtype) -> None:
    inputs, error = Inputs(kind, dtype), FUSED_ERROR if dtype == torch.float32 else BF16_ERROR
    ours, theirs = (inputs.chunked(fused=fused, chunk_rows=10) for fused in (True, False))
    _assert_close(ours.loss, theirs.loss, FUSED_ERROR)
    _assert_close(ours.row_loss, theirs.row_loss, FUSED_ERROR)
    _assert_close(ours.acceptance, theirs.acceptance, FUSED_ERROR)
    assert torch.equal(ours.matched, theirs.matched)
    for mine, other in zip(inputs.gradients(ours.loss), inputs.gradients(theirs.loss), strict=True):
        _assert_close(mine, other, error)


def test_bf16_multiplies_in_bf16_and_takes_the_softmax_in_fp32() -> None:
    inputs = Inputs("forward_kl", torch.bfloat16)
    found = inputs.chunked()
    logits, target = inputs.hidden @ inputs.head.T, inputs.teacher_hidden @ inputs.teacher_head.T
    expected = row_loss(inputs.divergence, logits.float(), target.float()).loss.detach()
    assert found.row_loss.dtype == torch.float32
    _assert_close(found.row_loss, expected * found.counted, FP32_ERROR)
    assert [gradient.dtype for gradient in inputs.gradients(found.loss)] == [torch.bfloat16] * 2


def test_autocast_multiplies_in_its_own_type() -> None:
    inputs, narrow = Inputs("ce", torch.float32), Inputs("ce", torch.bfloat16)
    narrow.labels, narrow.weights = inputs.labels, inputs.weights
    narrow.hidden, narrow.head = (value.detach().bfloat16().requires_grad_() for value in (inputs.hidden, inputs.head))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = inputs.chunked()
    assert torch.equal(found.loss, narrow.chunked().loss)
    for mine, other in zip(inputs.gradients(found.loss), narrow.gradients(narrow.chunked().loss), strict=True):
        assert mine.dtype == torch.float32
        _assert_close(mine, other, BF16_ERROR)


@pytest.mark.slow
def test_autocast_narrows_fp64_too() -> None:
    inputs = Inputs("tv")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = (inputs.chunked(fused=fused) for fused in (True, False))
    _assert_close(ours.loss, theirs.loss, FUSED_ERROR)
    assert [gradient.dtype for gradient in inputs.gradients(ours.loss)] == [torch.float64] * 2


@pytest.mark.parametrize("kind", ["ce", "hybrid"])
def test_statistics_are_those_of_the_rows(kind: Kind) -> None:
    inputs = Inputs(kind)
    found = inputs.chunked()
    target = inputs.labels if kind == "ce" else inputs.teacher_hidden @ inputs.teacher_head.T
    expected = row_loss(inputs.divergence, inputs.hidden @ inputs.head.T, target)
    assert torch.equal(found.counted, inputs.weights != 0)
    _assert_close(found.row_loss, expected.loss.detach() * found.counted, 1e-12)
    _assert_close(found.acceptance, expected.acceptance * found.counted, 1e-12)
    assert torch.equal(found.matched, expected.matched & found.counted)
    _assert_close(found.denominator, inputs.weights.sum(), 1e-12)
    assert [getattr(found, name).requires_grad for name in found.__slots__] == [True] + [False] * 5


class Watch(TorchDispatchMode):
    """The most bytes of any tensor that is made, views left out, and the rows of every product that gives logits."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.rows = 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {_storage(value) for value in args if isinstance(value, Tensor)}
        out = function(*args, **(kwargs or {}))
        tensors = [value for value in (out if isinstance(out, tuple | list) else [out]) if isinstance(value, Tensor)]
        made = [value.numel() * value.element_size() for value in tensors if _storage(value) not in known]
        self.largest = max([self.largest, *made])
        if "mm" in str(function) and tensors[0].shape[-1] == SIZE:
            self.rows += tensors[0].shape[0]
        return out


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    ("kind", "fused"),
    [*((kind, False) for kind in KINDS), *(pytest.param(kind, True, marks=pytest.mark.slow) for kind in ("ce", "hybrid"))],
)
def test_no_tensor_holds_all_logits(kind: Kind, fused: bool) -> None:
    rows, chunk, word = 40, 8, 4
    inputs = Inputs(kind, torch.float32, rows)
    with Watch() as watch:
        inputs.chunked(chunk_rows=chunk, fused=fused, weights=None).loss.backward()
    assert watch.largest == word * max(chunk * SIZE, rows * WIDTH, rows * TEACHER_WIDTH, SIZE * WIDTH)
    inputs.weights = inputs.weights.float()
    with Watch() as watch:
        inputs.whole().backward()
    assert watch.largest == word * rows * SIZE, "the watch sees logits where they are whole"


def test_a_frozen_head_gets_no_gradient_and_no_buffer_for_one() -> None:
    inputs = Inputs("forward_kl", torch.float32)
    inputs.head.requires_grad_(False)
    with Watch() as watch:
        inputs.chunked(chunk_rows=1).loss.backward()
    assert inputs.head.grad is None
    assert watch.largest < 4 * SIZE * WIDTH
    inputs.head.requires_grad_(True)
    expected = inputs.gradients(inputs.whole())[0]
    assert inputs.hidden.grad is not None
    _assert_close(inputs.hidden.grad, expected, FP32_ERROR)


def test_frozen_hidden_states_and_no_gradients_at_all() -> None:
    inputs = Inputs("tv")
    expected, by_head = inputs.whole(), inputs.gradients(inputs.whole())[1]
    with torch.no_grad():
        found = inputs.chunked()
    assert not found.loss.requires_grad
    _assert_close(found.loss, expected, 1e-12)
    inputs.hidden.requires_grad_(False)
    inputs.chunked().loss.backward()
    assert inputs.head.grad is not None
    _assert_close(inputs.head.grad, by_head, 1e-12)


@pytest.mark.parametrize("kind", ["ce", "reverse_kl"])
def test_rows_of_weight_0_are_not_multiplied(kind: Kind) -> None:
    inputs = Inputs(kind)
    expected = inputs.gradients(inputs.whole())
    skipped = inputs.weights == 0
    assert 0 < int(skipped.sum()) < ROWS
    with torch.no_grad():
        inputs.hidden[skipped], inputs.teacher_hidden[skipped] = float("nan"), float("nan")
    inputs.labels[skipped] = -100
    with Watch() as watch:
        found = inputs.chunked()
    assert watch.rows == int((~skipped).sum()) * (1 if kind == "ce" else 2)
    for mine, other in zip(inputs.gradients(found.loss), expected, strict=True):
        _assert_close(mine, other * (1 if mine.shape[0] == SIZE else ~skipped[:, None]), 1e-12)


def test_a_negative_label_is_a_row_that_does_not_count() -> None:
    inputs = Inputs("ce")
    inputs.divergence = Divergence()
    inputs.labels[::2] = -100
    found = inputs.chunked(weights=None)
    expected = torch.nn.functional.cross_entropy(inputs.hidden @ inputs.head.T, inputs.labels)
    _assert_close(found.loss, expected, 1e-12)
    assert torch.equal(found.counted, inputs.labels >= 0)


@pytest.mark.parametrize("rows", [0, 4])
def test_no_row_that_counts_is_a_loss_of_0(rows: int) -> None:
    inputs = Inputs("hybrid", rows=rows)
    found = inputs.chunked(weights=torch.zeros(rows))
    assert float(found.loss.detach()) == 0.0
    for gradient in inputs.gradients(found.loss):
        assert (gradient == 0).all()


def test_micro_batches_with_one_denominator_add_up() -> None:
    inputs = Inputs("hybrid")
    expected, total = inputs.whole(), inputs.weights.sum()
    by_head = inputs.gradients(expected)[1]
    losses = []
    for part in (slice(0, 9), slice(9, ROWS)):
        teacher = {"teacher_hidden": inputs.teacher_hidden[part], "teacher_head_weight": inputs.teacher_head}
        given = {"weights": inputs.weights[part], "denominator": total, "divergence": inputs.divergence}
        losses.append(chunked_loss(inputs.hidden[part], inputs.head, **teacher, **given).loss)
        losses[-1].backward()
    _assert_close(losses[0] + losses[1], expected, 1e-12)
    assert inputs.head.grad is not None
    _assert_close(inputs.head.grad, by_head, 1e-12)


@pytest.mark.parametrize(
    ("kind", "wrong", "named"),
    [
        ("ce", {"labels": None}, "takes labels"),
        ("tv", {"labels": torch.zeros(ROWS, dtype=torch.long)}, "no labels"),
        ("tv", {"teacher_head_weight": None}, "teacher_head_weight"),
        ("tv", {"teacher_head_weight": torch.zeros(SIZE + 1, TEACHER_WIDTH)}, f"{SIZE + 1}"),
        ("tv", {"teacher_hidden": torch.zeros(ROWS - 1, TEACHER_WIDTH)}, f"{ROWS} rows"),
        ("ce", {"labels": torch.zeros(ROWS)}, "int64"),
        ("ce", {"weights": torch.zeros(ROWS - 1)}, "weights"),
        ("ce", {"chunk_rows": 0}, "chunk_rows"),
        ("ce", {"fused": True}, "float64"),
    ],
)
def test_what_does_not_fit_is_refused(kind: Kind, wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(SpecDecError, match=named):
        Inputs(kind).chunked(**wrong)


def test_hidden_states_that_do_not_fit_the_head_are_refused() -> None:
    with pytest.raises(SpecDecError, match=r"\[R, H\]"):
        chunked_loss(torch.zeros(2, 3, WIDTH), torch.zeros(SIZE, WIDTH), labels=torch.zeros(6, dtype=torch.long))
