"""Divergences against sums written out in float64, and their gradients against closed forms and finite differences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from specdec.errors import SpecDecError
from specdec.training.divergences import KINDS, Divergence, Kind, row_loss

pytestmark = pytest.mark.slow

ROWS, SIZE = 5, 13
LAWS: tuple[Kind, ...] = KINDS[1:]


def _pair(kind: Kind) -> tuple[Tensor, Tensor]:
    """Logits of the draft and what they are compared with, in float64."""
    logits, other = (torch.randn(ROWS, SIZE, dtype=torch.float64) * 2 for _ in range(2))
    return logits, torch.randint(SIZE, (ROWS,)) if kind == "ce" else other


def _laws(divergence: Divergence, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """p and q as probabilities."""
    q = (logits / divergence.temperature).softmax(1)
    if divergence.kind == "ce":
        return torch.nn.functional.one_hot(target, SIZE).double(), q
    return (target / divergence.temperature).softmax(1), q


def _kl(a: Tensor, b: Tensor) -> Tensor:
    return torch.special.xlogy(a, a / b).sum(1)


def _expected(divergence: Divergence, p: Tensor, q: Tensor) -> Tensor:
    m = divergence.beta * p + (1 - divergence.beta) * q
    shared = torch.minimum(p, q).sum(1)
    share = (-divergence.decay * shared).exp()
    return {
        "ce": _kl(p, q),
        "forward_kl": _kl(p, q),
        "reverse_kl": _kl(q, p.clamp(min=1e-300)),
        "jsd": divergence.beta * _kl(p, m) + (1 - divergence.beta) * _kl(q, m),
        "tv": (p - q).abs().sum(1) / 2,
        "hybrid": share * _kl(p, q) + (1 - share) * (1 - shared),
    }[divergence.kind]


def _expected_gradient(divergence: Divergence, p: Tensor, q: Tensor) -> Tensor:
    """The formulas of the module's docstring."""
    below, m = (q < p).double(), divergence.beta * p + (1 - divergence.beta) * q

    def centred(slope: Tensor) -> Tensor:
        return q * (slope - (q * slope).sum(1, keepdim=True))

    share = (-divergence.decay * torch.minimum(p, q).sum(1, keepdim=True)).exp()
    gradient = {
        "ce": q - p,
        "forward_kl": q - p,
        "reverse_kl": centred((q / p).log()),
        "jsd": centred((1 - divergence.beta) * (q / m).log()),
        "tv": centred(-below),
        "hybrid": share * (q - p) + (1 - share) * centred(-below),
    }[divergence.kind]
    return gradient / divergence.temperature


@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.5])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_those_of_the_formulas(kind: Kind, temperature: float) -> None:
    divergence = Divergence(kind, temperature, beta=0.3, decay=2.0)
    logits, target = _pair(kind)
    p, q = _laws(divergence, logits, target)
    leaf = logits.clone().requires_grad_()
    found = row_loss(divergence, leaf, target)
    (gradient,) = torch.autograd.grad(found.loss.sum(), leaf)
    assert torch.allclose(found.loss, _expected(divergence, p, q), rtol=1e-12, atol=1e-12)
    assert torch.allclose(gradient, _expected_gradient(divergence, p, q), rtol=1e-10, atol=1e-12)
    assert torch.allclose(found.acceptance, torch.minimum(p, q).sum(1), rtol=1e-12)
    assert torch.equal(found.matched, p.argmax(1) == q.argmax(1))
    assert not found.acceptance.requires_grad


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "hybrid"])
def test_gradients_by_finite_differences(kind: Kind) -> None:
    """Not of the hybrid: its share follows the acceptance and is held constant."""
    logits, target = _pair(kind)
    divergence = Divergence(kind, temperature=1.3, beta=0.7)
    assert torch.autograd.gradcheck(lambda z: row_loss(divergence, z, target).loss, logits.requires_grad_())


def test_cross_entropy_is_that_of_torch_and_of_a_law_on_one_token() -> None:
    logits, labels = _pair("ce")
    loss = row_loss(Divergence("ce"), logits, labels).loss
    assert torch.allclose(loss, torch.nn.functional.cross_entropy(logits, labels, reduction="none"))
    one = torch.full_like(logits, float("-inf")).scatter(1, labels[:, None], 0.0)
    for kind in ("forward_kl", "jsd", "tv"):
        found = row_loss(Divergence(kind), logits, one)
        assert found.loss.isfinite().all()
    assert torch.allclose(row_loss(Divergence("forward_kl"), logits, one).loss, loss)


def test_total_variation_is_one_minus_acceptance_and_the_jsd_is_symmetric_in_the_middle() -> None:
    logits, other = _pair("tv")
    found = row_loss(Divergence("tv"), logits, other)
    assert torch.allclose(found.loss, 1 - found.acceptance)
    there, back = (row_loss(Divergence("jsd"), a, b).loss for a, b in ((logits, other), (other, logits)))
    assert torch.allclose(there, back)


@pytest.mark.parametrize("kind", LAWS)
def test_equal_laws_have_no_loss_and_no_gradient(kind: Kind) -> None:
    logits, _ = _pair(kind)
    leaf = logits.clone().requires_grad_()
    found = row_loss(Divergence(kind), leaf, logits)
    (gradient,) = torch.autograd.grad(found.loss.sum(), leaf)
    assert found.loss.abs().max() < 1e-12
    assert torch.allclose(found.acceptance, torch.ones(ROWS, dtype=torch.float64))
    assert gradient.abs().max() < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_that_neither_law_has_change_nothing(kind: Kind) -> None:
    logits, target = _pair(kind)
    pad = (0, 3)
    wide = torch.nn.functional.pad(logits, pad, value=float("-inf")).requires_grad_()
    wide_target = target if kind == "ce" else torch.nn.functional.pad(target, pad, value=float("-inf"))
    leaf = logits.clone().requires_grad_()
    ours, theirs = row_loss(Divergence(kind), wide, wide_target), row_loss(Divergence(kind), leaf, target)
    assert torch.allclose(ours.loss, theirs.loss)
    (of_wide,) = torch.autograd.grad(ours.loss.sum(), wide)
    (of_leaf,) = torch.autograd.grad(theirs.loss.sum(), leaf)
    assert torch.allclose(of_wide[:, :SIZE], of_leaf)
    assert (of_wide[:, SIZE:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_computed_in_fp32(kind: Kind, dtype: torch.dtype) -> None:
    logits, target = _pair(kind)
    narrow, narrow_target = logits.to(dtype), target if kind == "ce" else target.to(dtype)
    found = row_loss(Divergence(kind), narrow, narrow_target)
    wide = row_loss(Divergence(kind), narrow.float(), narrow_target if kind == "ce" else narrow_target.float())
    assert found.loss.dtype == torch.float32
    assert torch.equal(found.loss, wide.loss)


@pytest.mark.parametrize("kind", LAWS)
def test_the_target_gets_no_gradient(kind: Kind) -> None:
    logits, target = _pair(kind)
    target.requires_grad_()
    row_loss(Divergence(kind), logits.requires_grad_(), target).loss.sum().backward()
    assert target.grad is None


@pytest.mark.parametrize(
    ("wrong", "named"),
    [({"kind": "mse"}, "mse"), ({"temperature": 0.0}, "0.0"), ({"beta": 1.0}, "1.0"), ({"decay": -1.0}, "-1.0")],
)
def test_what_is_no_divergence_is_refused(wrong: dict[str, object], named: str) -> None:
    with pytest.raises(SpecDecError, match=named):
        Divergence(**wrong)  # type: ignore[arg-type]
