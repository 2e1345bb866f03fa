"""Divergences of a draft law q from a target law p, row by row, from logits: the definition of correct.

The fused kernel and the chunked losses are tested against these. With z the draft's logits, T the temperature, q = softmax(z / T)
and <.> the mean under q, the gradients with respect to z are

    ce, forward_kl  (q - p) / T            (p has all its weight on the label for ce)
    reverse_kl      q (log(q / p) - <log(q / p)>) / T
    jsd             (1 - beta) q (log(q / m) - <log(q / m)>) / T, with m = beta p + (1 - beta) q
    tv              q (<[q < p]> - [q < p]) / T
    hybrid          lambda times that of forward_kl and (1 - lambda) times that of tv
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from specdec.errors import SpecDecError

Kind = Literal["ce", "forward_kl", "reverse_kl", "jsd", "tv", "hybrid"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True, slots=True)
class Divergence:
    """Which divergence is minimised.

    kind: "ce" compares with labels, the others with the target's whole law:
    "forward_kl" KL(p, q); "reverse_kl" KL(q, p) (DistillSpec, arXiv 2310.08461); "jsd" beta KL(p, m) + (1 - beta) KL(q, m)
    with m = beta p + (1 - beta) q (the same paper); "tv" 1 - sum min(p, q), which is 1 - acceptance;
    "hybrid" lambda KL(p, q) + (1 - lambda) TV with lambda = exp(-decay * acceptance), held constant (LK loss, arXiv 2602.23881).
    temperature: both laws are softmax(logits / temperature); the loss is not multiplied by its square.
    beta: of "jsd", strictly between 0 and 1.  decay: of "hybrid".  Raises `SpecDecError` on any other value.
    """

    kind: Kind = "ce"
    temperature: float = 1.0
    beta: float = 0.5
    decay: float = 3.0

    def __post_init__(self) -> None:
        """Refuse what is no divergence."""
        if self.kind not in KINDS:
            raise SpecDecError(f"divergence {self.kind!r} is not known; choose one of {', '.join(KINDS)}")
        if not 0 < self.temperature < float("inf"):
            raise SpecDecError(f"temperature {self.temperature} of a loss is not above 0 and finite; 1 leaves the laws as they are")
        if not 0 < self.beta < 1:
            raise SpecDecError(
                f"beta {self.beta} of the JSD is not strictly between 0 and 1; its ends are forward_kl and reverse_kl"
            )
        if not 0 <= self.decay < float("inf"):
            raise SpecDecError(f"decay {self.decay} of the hybrid is negative or not finite; the paper takes 3")


class RowLoss(NamedTuple):
    """What a divergence gives for R rows.

    loss: [R] fp32, or fp64 where the logits are.  acceptance: [R] sum of min(p, q) at the divergence's temperature, for "ce" q of
    the label; no gradient.  matched: [R] bool, the most probable token of q is that of p, or the label; the lowest of equals.
    """

    loss: Tensor
    acceptance: Tensor
    matched: Tensor


def row_loss(divergence: Divergence, logits: Tensor, target: Tensor) -> RowLoss:
    """The divergence of every row, differentiable with respect to the draft's logits and not to the target.

    logits: [R, V] of the draft.  target: [R] int64 labels within [0, V) for "ce", else [R, V] logits of the target.
    A logit of -inf is a token of probability 0: it adds nothing where the law it is weighted by also leaves it out.
    Softmax and sums are fp32 for narrower logits.
    """
    log_q = _log_law(logits, divergence.temperature)
    if divergence.kind == "ce":
        picked = log_q.gather(1, target[:, None])[:, 0]
        return RowLoss(-picked, picked.detach().exp(), logits.detach().argmax(1) == target)
    log_p = _log_law(target.detach(), divergence.temperature)
    with torch.no_grad():
        acceptance = torch.minimum(log_p, log_q).exp().sum(1)
        matched = logits.argmax(1) == target.argmax(1)
    return RowLoss(_of_laws(divergence, log_p, log_q, acceptance), acceptance, matched)


def _log_law(logits: Tensor, temperature: float) -> Tensor:
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return (wide / temperature).log_softmax(1)


def _of_laws(divergence: Divergence, log_p: Tensor, log_q: Tensor, acceptance: Tensor) -> Tensor:
    match divergence.kind:
        case "forward_kl":
            return _kl(log_p, log_q)
        case "reverse_kl":
            return _kl(log_q, log_p)
        case "jsd":
            return _jsd(log_p, log_q, divergence.beta)
        case "tv":
            return _tv(log_p, log_q)
        case _:
            share = (-divergence.decay * acceptance).exp()
            return share * _kl(log_p, log_q) + (1 - share) * _tv(log_p, log_q)


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """[R]: KL(a, b). The difference of two -inf must not even meet the gradient of a weight of 0."""
    weight = log_a.exp()
    drawn = weight > 0
    ratio = torch.where(drawn, log_a, 0.0) - torch.where(drawn, log_b, 0.0)
    return (weight * ratio).sum(1)


def _jsd(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    mixed = beta * log_p.exp() + (1 - beta) * log_q.exp()
    log_m = torch.where(mixed > 0, mixed, 1.0).log()
    return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)


def _tv(log_p: Tensor, log_q: Tensor) -> Tensor:
    """[R]: the mass that p has above q, whose gradient where they are equal is 0."""
    return (log_p.exp() - log_q.exp()).relu().sum(1)
