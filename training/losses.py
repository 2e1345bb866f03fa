"""Losses over a large vocabulary, from hidden states, a chunk of rows at a time: the whole [R, V] logits never exist.

The gradient of a chunk's loss with respect to its logits is found while the chunk is there, and turned at once into that of the
hidden states and of the head; the backward pass only scales what the forward pass kept, [R, H] and [V, H].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from specdec.errors import SpecDecError
from specdec.training.divergences import Divergence, RowLoss, row_loss

CROSS_ENTROPY = Divergence()
# Rows of a chunk; on a CPU as many as stay in its cache.
_CHUNK = {"cpu": 128, "cuda": 512}
_FUSED_TYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class ChunkedLoss:
    """A loss and what it says of R rows, all on the device of the hidden states; nothing was copied to the host.

    loss: scalar, sum of weight * row loss / denominator, the only differentiable member; 0 where no row counts.
    denominator: scalar, by default the sum of the weights.  counted: [R] bool, the rows that were computed.
    row_loss, acceptance, matched: [R] as in `RowLoss`; 0 and False in rows that were not.
    """

    loss: Tensor
    denominator: Tensor
    row_loss: Tensor
    acceptance: Tensor
    matched: Tensor
    counted: Tensor


@dataclass(frozen=True, slots=True)
class _Job:
    """What the chunks of one loss share. target: labels [R] or the target's hidden states [R, Ht].  weights: [R].

    dtype: of the products; the softmax is at least fp32.
    """

    target: Tensor
    target_head: Tensor | None
    weights: Tensor
    divergence: Divergence
    chunk_rows: int | None
    fused: bool
    dtype: torch.dtype
    gradients: tuple[bool, bool]

    def chunks(self) -> Iterator[slice]:
        """Consecutive slices of at most `chunk_rows` rows, or of as many as suit the device."""
        size = self.chunk_rows or _CHUNK.get(self.weights.device.type, _CHUNK["cuda"])
        for start in range(0, self.weights.shape[0], size):
            yield slice(start, min(start + size, self.weights.shape[0]))


def chunked_loss(
    hidden: Tensor,
    head_weight: Tensor,
    *,
    labels: Tensor | None = None,
    teacher_hidden: Tensor | None = None,
    teacher_head_weight: Tensor | None = None,
    weights: Tensor | None = None,
    denominator: Tensor | float | None = None,
    divergence: Divergence = CROSS_ENTROPY,
    chunk_rows: int | None = None,
    fused: bool | None = None,
) -> ChunkedLoss:
    """The weighted mean divergence of the laws softmax(hidden @ head_weight.T), differentiable by hidden and head_weight.

    hidden: [R, H].  head_weight: [V, H].  labels: [R] int64 for "ce"; a negative label is a row that does not count.
    teacher_hidden: [R, Ht] and teacher_head_weight: [V, Ht] for the other divergences; they get no gradient.  weights: [R],
    by default 1; a row of weight 0 is left out of every product, which costs one wait for the device where weights or labels
    are given.  denominator: what the sum is divided by, by default the sum of the weights; give the sum over all
    micro-batches and machines where gradients are accumulated.  divergence: by default cross-entropy.  chunk_rows: rows whose
    logits exist at a time: one buffer of [chunk_rows, V] a law when fused, about six in fp32 when not; by default 512, on a CPU
    128.  fused: the Triton kernel; by default where CUDA and Triton are there and the logits are not fp64.

    Products are in the dtype of `hidden`, or that of autocast; softmax and sums in fp32 (fp64 for fp64); the gradient of the
    head is summed over chunks in fp32. There are no second derivatives. Raises `SpecDecError` where the arguments do not fit.
    """
    _check(hidden, head_weight, labels, teacher_hidden, teacher_head_weight, weights, divergence, chunk_rows)
    target = teacher_hidden if labels is None else labels.to(hidden.device)
    assert target is not None
    scale = _scales(hidden, weights)
    counted = scale != 0 if labels is None else (scale != 0) & (target >= 0)
    kept = None if weights is None and labels is None else counted.nonzero()[:, 0]
    if kept is not None:
        hidden, target, scale = (values.index_select(0, kept) for values in (hidden, target, scale))
    how = _fuses(fused, hidden), _product_type(hidden), _wanted(hidden, head_weight)
    job = _Job(target, teacher_head_weight, scale, divergence, chunk_rows, *how)
    total, *rows = _Chunked.apply(hidden, head_weight, job)
    divisor = _divisor(scale.sum() if denominator is None else denominator, total)
    found = RowLoss(*(row if kept is None else _spread(row, kept, counted) for row in rows))
    return ChunkedLoss(total / divisor, divisor, found.loss, found.acceptance, found.matched, counted)


def taught_loss(
    hidden: Tensor,
    head_weight: Tensor,
    divergence: Divergence,
    *,
    labels: Tensor,
    teacher: Callable[[], tuple[Tensor, Tensor]],
    weights: Tensor | None = None,
    denominator: Tensor | float | None = None,
) -> ChunkedLoss:
    """`chunked_loss` from labels for "ce", else from a target. teacher: called only then; its hidden states [R, Ht] and head."""
    if divergence.kind == "ce":
        return chunked_loss(hidden, head_weight, labels=labels, weights=weights, denominator=denominator)
    with torch.no_grad():
        states, head = teacher()
    return chunked_loss(
        hidden, head_weight, teacher_hidden=states, teacher_head_weight=head, weights=weights, denominator=denominator,
        divergence=divergence,
    )  # fmt: skip


def _check(
    hidden: Tensor, head: Tensor, labels: Tensor | None, teacher: Tensor | None, teacher_head: Tensor | None,
    weights: Tensor | None, divergence: Divergence, chunk_rows: int | None,
) -> None:  # fmt: skip
    """Everything that can be said without looking at a value on the device."""
    if hidden.dim() != 2 or head.dim() != 2 or hidden.shape[1] != head.shape[1]:
        raise SpecDecError(
            f"hidden {list(hidden.shape)} and head_weight {list(head.shape)} are not [R, H] and [V, H]; reshape them"
        )
    rows, vocabulary = hidden.shape[0], head.shape[0]
    if chunk_rows is not None and chunk_rows < 1:
        raise SpecDecError(f"chunk_rows {chunk_rows} is not at least 1; 512 is a good value")
    if weights is not None and weights.shape != (rows,):
        raise SpecDecError(f"weights {list(weights.shape)} do not give a value to each of {rows} rows; pass [R]")
    if divergence.kind == "ce":
        if labels is None or teacher is not None or teacher_head is not None:
            raise SpecDecError('divergence "ce" takes labels and no teacher; choose another divergence to learn from a teacher')
        if labels.shape != (rows,) or labels.dtype != torch.int64:
            raise SpecDecError(f"labels {list(labels.shape)} {labels.dtype} are not [R] int64 with {rows} rows")
        return
    if labels is not None or teacher is None or teacher_head is None:
        raise SpecDecError(
            f'divergence "{divergence.kind}" takes teacher_hidden and teacher_head_weight and no labels; "ce" takes labels'
        )
    if teacher.dim() != 2 or teacher.shape[0] != rows or teacher.shape[1:] != teacher_head.shape[1:]:
        shapes = f"teacher_hidden {list(teacher.shape)} and teacher_head_weight {list(teacher_head.shape)}"
        raise SpecDecError(f"{shapes} are not [R, Ht] and [V, Ht] with {rows} rows")
    if teacher_head.shape[0] != vocabulary:
        raise SpecDecError(
            f"the draft has {vocabulary} tokens and the teacher {teacher_head.shape[0]}; cut both heads to the ids they share"
        )


def _scales(hidden: Tensor, weights: Tensor | None) -> Tensor:
    """[R] weights as wide as the sums are."""
    wide = torch.float64 if _product_type(hidden) == torch.float64 else torch.float32
    if weights is None:
        return torch.ones(hidden.shape[0], dtype=wide, device=hidden.device)
    return weights.detach().to(hidden.device, wide)


def _fuses(fused: bool | None, hidden: Tensor) -> bool:
    """Whether the Triton kernel runs."""
    possible = find_spec("triton") is not None and _product_type(hidden) in _FUSED_TYPES
    if fused is None:
        return possible and hidden.is_cuda
    if fused and not possible:
        raise SpecDecError(f"fused=True needs Triton and fp32, bf16 or fp16, not {hidden.dtype}; leave fused out")
    if fused and not hidden.is_cuda and not _interprets():
        raise SpecDecError(f"fused=True needs a CUDA device, and the hidden states are on {hidden.device}; leave fused out")
    return fused


def _interprets() -> bool:
    """Whether kernels run in Triton's interpreter, on any device."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def _product_type(hidden: Tensor) -> torch.dtype:
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def _wanted(hidden: Tensor, head: Tensor) -> tuple[bool, bool]:
    """Which gradients the backward pass will ask for."""
    enabled = torch.is_grad_enabled()
    return enabled and hidden.requires_grad, enabled and head.requires_grad


def _divisor(given: Tensor | float, total: Tensor) -> Tensor:
    """A scalar like the total; 1 instead of 0, since a loss without rows is 0."""
    value = torch.as_tensor(given, dtype=total.dtype, device=total.device).detach()
    return torch.where(value == 0, 1.0, value)


def _spread(values: Tensor, kept: Tensor, like: Tensor) -> Tensor:
    """[R]: the values at the rows that were kept, elsewhere 0."""
    return values.new_zeros(like.shape).index_copy(0, kept, values)


class _Chunked(torch.autograd.Function):
    """Sum of weight * row loss, and per row loss, acceptance and match."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, job: _Job) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """hidden: [R, H] rows that all count.  head: [V, H]."""
        with torch.autocast(hidden.device.type, enabled=False):
            rows, of_hidden, of_head = _run(hidden.to(job.dtype), head.to(job.dtype), job)
        ctx.save_for_backward(of_hidden, of_head)
        ctx.dtypes = hidden.dtype, head.dtype
        ctx.mark_non_differentiable(*rows)
        return (rows.loss * job.weights).sum(), *rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_total: Tensor, *_: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """The gradients that the forward pass found, scaled."""
        of_hidden, of_head = (
            None if gradient is None else (gradient * by_total).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return of_hidden, of_head, None


def _run(hidden: Tensor, head: Tensor, job: _Job) -> tuple[RowLoss, Tensor | None, Tensor | None]:
    """The rows' losses, and the gradients of their weighted sum by hidden and head; the head's is summed in fp32 at least."""
    wide = job.weights.dtype
    by_hidden, by_head = job.gradients
    of_hidden = torch.empty_like(hidden) if by_hidden else None
    of_head = torch.zeros(head.shape, dtype=wide, device=head.device) if by_head else None
    step = _fused_step() if job.fused else _eager_step
    empty = job.weights
    rows = RowLoss(torch.empty_like(empty), torch.empty_like(empty), torch.empty_like(empty, dtype=torch.bool))
    target_head = None if job.target_head is None else job.target_head.detach().to(job.dtype)
    for chunk in job.chunks():
        logits, target = linear(hidden[chunk], head), job.target[chunk]
        if target_head is not None:
            target = linear(target.detach().to(job.dtype), target_head)
        found, slope = step(logits, target, job.weights[chunk], job.divergence, by_hidden or by_head)
        for whole, part in zip(rows, found, strict=True):
            whole[chunk] = part
        if of_hidden is not None:
            torch.mm(slope, head, out=of_hidden[chunk])
        if of_head is not None and of_head.dtype == slope.dtype:
            of_head.addmm_(slope.T, hidden[chunk])
        elif of_head is not None:
            of_head += slope.T @ hidden[chunk]
    return rows, of_hidden, of_head


_Step = Callable[[Tensor, Tensor, Tensor, Divergence, bool], tuple[RowLoss, Tensor]]


def _eager_step(logits: Tensor, target: Tensor, weights: Tensor, divergence: Divergence, gradient: bool) -> tuple[RowLoss, Tensor]:
    """The rows' losses, and the gradient of their weighted sum by the logits, as autograd finds it where nothing is faster."""
    if not gradient:
        return row_loss(divergence, logits, target), logits
    if divergence.kind == "forward_kl":
        return _forward_kl_step(logits, target, weights, divergence.temperature)
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        found = row_loss(divergence, leaf, target)
        (slope,) = torch.autograd.grad((found.loss * weights).sum(), leaf)
    return RowLoss(found.loss.detach(), found.acceptance, found.matched), slope


def _forward_kl_step(logits: Tensor, target: Tensor, weights: Tensor, temperature: float) -> tuple[RowLoss, Tensor]:
    """The commonest divergence from a target by its formula: on a CPU a third of autograd's time, as each pass is over [C, V]."""
    wide = weights.dtype
    cooled = (values.to(wide) if temperature == 1 else values.to(wide) / temperature for values in (logits, target))
    log_q, log_p = (values.log_softmax(1) for values in cooled)
    matched = log_q.max(1).indices == log_p.max(1).indices
    q, p = log_q.exp(), log_p.exp()
    acceptance = torch.minimum(p, q).sum(1)
    # Where p is 0 the difference of the logarithms may be no number, and adds nothing.
    ratio = log_p.sub_(log_q).nan_to_num_()
    loss = torch.linalg.vecdot(p, ratio)
    slope = q.sub_(p).mul_((weights / temperature)[:, None])
    return RowLoss(loss, acceptance, matched), slope.to(logits.dtype)


def _fused_step() -> _Step:
    """The same in Triton, which is imported where it is used: it does not exist on every system."""
    from specdec.kernels.fused_loss import fused_loss

    def step(logits: Tensor, target: Tensor, weights: Tensor, divergence: Divergence, gradient: bool) -> tuple[RowLoss, Tensor]:
        found = fused_loss(
            logits, target, weights, kind=divergence.kind, temperature=divergence.temperature,
            beta=divergence.beta, decay=divergence.decay, gradient=gradient,
        )  # fmt: skip
        return RowLoss(*found), logits

    return step
