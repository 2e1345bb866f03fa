"""The loss of a chunk of logits and its gradient in Triton: one program a row, and the gradient overwrites the logits.

A first pass finds the normalisers of both laws (online softmax), a second the sums that the loss and the slope need, a last one
writes the gradient; labels and the forward KL need no sums before they write, so they take two. No second [R, V] buffer
exists. The twin, and the formulas, are `training/divergences.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec.kernels.variant import Variant

KINDS = ("ce", "forward_kl", "reverse_kl", "jsd", "tv", "hybrid")
# Below every logit but -inf, so that the difference to it is never NaN.
_LOWEST = tl.constexpr(-3.0e38)
_NO_TOKEN = tl.constexpr(1 << 30)
_BLOCK = 4096
_WARPS = 8


class LossRows(NamedTuple):
    """What the kernel gives for R rows. loss, acceptance: [R] fp32.  matched: [R] bool."""

    loss: Tensor
    acceptance: Tensor
    matched: Tensor


@triton.jit
def _normaliser(row, vocabulary, inverse, BLOCK: tl.constexpr):
    """log sum exp of the row's values times `inverse`, and the lowest of its highest tokens."""
    highest = tl.full((BLOCK,), _LOWEST, tl.float32)
    mass, token = tl.zeros((BLOCK,), tl.float32), tl.full((BLOCK,), _NO_TOKEN, tl.int32)
    for start in range(0, vocabulary, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        value = tl.load(row + columns, mask=columns < vocabulary, other=float("-inf")).to(tl.float32) * inverse
        # One exponential serves both cases: what was summed shrinks, or the new value does.
        higher, other = value > highest, tl.exp(-tl.abs(value - highest))
        mass = tl.where(higher, mass * other + 1.0, mass + other)
        token = tl.where(higher, columns, token)
        highest = tl.where(higher, value, highest)
    top = tl.max(highest, 0)
    whole = tl.sum(mass * tl.exp(highest - top), 0)
    return top + tl.log(whole), tl.min(tl.where(highest == top, token, _NO_TOKEN), 0)


@triton.jit
def _laws(logits, target, columns, vocabulary, inverse, log_sum_q, log_sum_p):
    """log q and log p of a block, -inf beyond the vocabulary."""
    live = columns < vocabulary
    log_q = tl.load(logits + columns, mask=live, other=float("-inf")).to(tl.float32) * inverse - log_sum_q
    log_p = tl.load(target + columns, mask=live, other=float("-inf")).to(tl.float32) * inverse - log_sum_p
    return log_q, log_p


@triton.jit
def _weighted(weight, difference):
    """weight * difference, and 0 where the weight is 0, whatever the difference is."""
    return tl.where(weight == 0.0, 0.0, weight * difference)


@triton.jit
def _slope(log_q, log_p, q, p, beta, KIND: tl.constexpr):
    """The derivative of the loss by q, up to a constant; of the hybrid, that of its total variation."""
    if KIND == "reverse_kl":
        return log_q - log_p
    elif KIND == "jsd":
        return (1.0 - beta) * (log_q - tl.log(beta * p + (1.0 - beta) * q))
    else:
        return tl.where(log_q < log_p, -1.0, 0.0)


@triton.jit
def _sums(logits, target, vocabulary, inverse, log_sum_q, log_sum_p, beta, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """The sums over a row of min(p, q), of the terms of the loss, and of q times the slope; of the hybrid, the loss is the KL."""
    shared, loss, mean = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        log_q, log_p = _laws(logits, target, start + tl.arange(0, BLOCK), vocabulary, inverse, log_sum_q, log_sum_p)
        q, p = tl.exp(log_q), tl.exp(log_p)
        shared += tl.where(log_q < log_p, q, p)
        mean += _weighted(q, _slope(log_q, log_p, q, p, beta, KIND))
        if KIND == "hybrid":
            loss += _weighted(p, log_p - log_q)
        elif KIND == "jsd":
            loss += beta * _weighted(p, log_p - tl.log(beta * p + (1.0 - beta) * q))
        elif KIND == "tv":
            loss += tl.where(log_q < log_p, p - q, 0.0)
    return tl.sum(shared, 0), tl.sum(loss, 0), tl.sum(mean, 0)


@triton.jit
def _label(
    logits, target, vocabulary, inverse, scale, log_sum, GRAD: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """log q of the label; the row becomes the gradient."""
    label = tl.load(target).to(tl.int32)
    picked = tl.load(logits + label).to(tl.float32) * inverse - log_sum
    if GRAD:
        # No warp may still have to read the label's logit.
        tl.debug_barrier()
        for start in range(0, vocabulary, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            live = columns < vocabulary
            q = tl.exp(tl.load(logits + columns, mask=live, other=float("-inf")).to(tl.float32) * inverse - log_sum)
            slope = (q - tl.where(columns == label, 1.0, 0.0)) * inverse * scale
            tl.store(logits + columns, slope.to(logits.dtype.element_ty), mask=live)
    return picked, label


@triton.jit
def _forward(
    logits, target, vocabulary, inverse, scale, log_sum_q, log_sum_p, GRAD: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The sums of min(p, q) and of the forward KL; the row becomes the gradient."""
    shared, loss = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        log_q, log_p = _laws(logits, target, columns, vocabulary, inverse, log_sum_q, log_sum_p)
        q, p = tl.exp(log_q), tl.exp(log_p)
        shared += tl.where(log_q < log_p, q, p)
        loss += _weighted(p, log_p - log_q)
        if GRAD:
            tl.store(logits + columns, ((q - p) * inverse * scale).to(logits.dtype.element_ty), mask=columns < vocabulary)
    return tl.sum(shared, 0), tl.sum(loss, 0)


@triton.jit
def _descend(
    logits, target, vocabulary, inverse, scale, log_sum_q, log_sum_p, beta, mean, share,
    KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The row becomes the gradient: q times the slope's deviation from its mean, of the hybrid mixed with that of the KL."""
    for start in range(0, vocabulary, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        log_q, log_p = _laws(logits, target, columns, vocabulary, inverse, log_sum_q, log_sum_p)
        q, p = tl.exp(log_q), tl.exp(log_p)
        slope = _weighted(q, _slope(log_q, log_p, q, p, beta, KIND) - mean)
        if KIND == "hybrid":
            slope = share * (q - p) + (1.0 - share) * slope
        tl.store(logits + columns, (slope * inverse * scale).to(logits.dtype.element_ty), mask=columns < vocabulary)


@triton.jit
def _loss(
    logits, target, scales, losses, accepts, matches, logits_row, target_row, vocabulary, inverse, beta, decay,
    KIND: tl.constexpr, GRAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * logits_row
    target += row * target_row
    scale = tl.load(scales + row)
    log_sum_q, token = _normaliser(logits, vocabulary, inverse, BLOCK)
    if KIND == "ce":
        picked, wanted = _label(logits, target, vocabulary, inverse, scale, log_sum_q, GRAD, BLOCK)
        loss, shared = -picked, tl.exp(picked)
    else:
        log_sum_p, wanted = _normaliser(target, vocabulary, inverse, BLOCK)
        if KIND == "forward_kl":
            shared, loss = _forward(logits, target, vocabulary, inverse, scale, log_sum_q, log_sum_p, GRAD, BLOCK)
        else:
            shared, loss, mean = _sums(logits, target, vocabulary, inverse, log_sum_q, log_sum_p, beta, KIND, BLOCK)
            share = tl.exp(-decay * shared)
            if KIND == "reverse_kl":
                loss = mean
            elif KIND == "jsd":
                loss += mean
            elif KIND == "hybrid":
                loss = share * loss + (1.0 - share) * (1.0 - shared)
            if GRAD:
                _descend(
                    logits, target, vocabulary, inverse, scale, log_sum_q, log_sum_p, beta, mean, share, KIND, BLOCK
                )  # fmt: skip
    tl.store(losses + row, loss)
    tl.store(accepts + row, shared)
    tl.store(matches + row, (token == wanted).to(tl.int8))


def fused_loss(
    logits: Tensor,
    target: Tensor,
    scales: Tensor,
    *,
    kind: str,
    temperature: float = 1.0,
    beta: float = 0.5,
    decay: float = 3.0,
    gradient: bool = True,
) -> LossRows:
    """The loss of every row; with `gradient`, the logits are overwritten by scales[r] times its gradient with respect to them.

    logits: [R, V] of the draft, fp32, bf16 or fp16, last dimension dense.  target: [R] int64 labels within [0, V) for "ce", else
    [R, V] logits of the target, last dimension dense, which are left as they are.  scales: [R] fp32, dense; the loss is not scaled.
    kind, temperature, beta, decay: as in `Divergence`. Sums are fp32, in an order that depends on V alone.
    """
    rows, vocabulary = logits.shape
    assert kind in KINDS, kind
    assert scales.dtype == torch.float32, "scales are fp32"
    assert scales.is_contiguous(), "scales are dense"
    for dense in (logits, target) if kind != "ce" else (logits,):
        assert dense.stride(1) == 1 or vocabulary == 1, "the last dimension is dense"
    out = torch.empty(2, rows, dtype=torch.float32, device=logits.device)
    matched = torch.empty(rows, dtype=torch.int8, device=logits.device)
    if rows:
        _loss[(rows,)](
            logits, target, scales, out[0], out[1], matched, logits.stride(0), target.stride(0), vocabulary, 1.0 / temperature,
            beta, decay, KIND=kind, GRAD=gradient, BLOCK=_BLOCK, num_warps=_WARPS,
        )  # fmt: skip
    return LossRows(out[0], out[1], matched.bool())


def variants() -> Iterator[Variant]:
    """Ahead-of-time compilation: every divergence in fp32 and bf16. Without its gradient a kernel is a part of these."""
    scalars = {"logits_row": "i32", "target_row": "i32", "vocabulary": "i32", "inverse": "fp32", "beta": "fp32", "decay": "fp32"}
    outputs = {"scales": "*fp32", "losses": "*fp32", "accepts": "*fp32", "matches": "*i8"}
    for kind in KINDS:
        for dtype in ("bf16", "fp32"):
            rows = {"logits": f"*{dtype}", "target": "*i64" if kind == "ce" else f"*{dtype}"}
            constants = {"KIND": kind, "GRAD": True, "BLOCK": _BLOCK}
            yield Variant(f"loss {kind} {dtype}", _loss, rows | outputs | scalars, constants, _WARPS)
