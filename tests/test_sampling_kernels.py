"""The filter kernel against its twin, and the twin against the warpers of transformers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from specdec.kernels import reference_rules
from specdec.kernels.sampling import filter_logits

pytestmark = pytest.mark.slow

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = [1, 7, 64, 1000, 5003]
TEMPERATURES, TOP_KS, TOP_PS, MIN_PS = [0.7, 1.0, 1.9], [50, 1, 0], [0.9, 0.2, 1.0], [0.05, 0.0, 1.0]


def _logits(rows: int, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(rows, size) * 3).to(DEVICE, dtype)


def _given(values: list[float], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def _assert_same(logits: Tensor, **given: Tensor | None) -> Tensor:
    """The same values and the same tokens left, to the last bit; sums of fp32 and of float64 agree on these rows."""
    ours = filter_logits(logits, **given)
    theirs = reference_rules.filter_logits(logits, **given)
    assert ours.dtype == torch.float32
    assert torch.equal(ours.nan_to_num(nan=7.0), theirs.nan_to_num(nan=7.0)), (ours != theirs).nonzero()
    return ours


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("used", ["temperature", "top_k", "top_p", "min_p", "all"])
def test_against_the_twin(used: str, size: int) -> None:
    given = {
        "temperature": _given(TEMPERATURES),
        "top_k": _given(TOP_KS, torch.int64),
        "top_p": _given(TOP_PS),
        "min_p": _given(MIN_PS),
    }
    _assert_same(_logits(3, size), **{name: value for name, value in given.items() if used in (name, "all")})


def test_nothing_to_do() -> None:
    logits = _logits(2, 64)
    assert torch.equal(filter_logits(logits), logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_has_many_ties(dtype: torch.dtype) -> None:
    found = _assert_same(_logits(2, 5003, dtype), top_k=_given([40, 900], torch.int64), top_p=_given([0.8, 0.95]))
    assert (found.isfinite().sum(1) > 1).all()


@pytest.mark.parametrize("kept", [1, 2, 63, 64, 65, 1000])
def test_every_tie_with_the_kth_largest_stays(kept: int) -> None:
    logits = torch.randint(0, 20, (2, 64), device=DEVICE).float() - 10.0
    logits[0, ::9] = -0.0
    _assert_same(logits, top_k=_given([kept, kept], torch.int64))


def _probability_near(logits: Tensor, top_p: Tensor) -> Tensor:
    """Where rounding may decide: what is above the token sums to top_p within 1e-5, or ties with such a token."""
    mass = logits.double().softmax(-1)
    return (reference_rules._mass_above(logits, mass) - top_p.double()[:, None]).abs() < 1e-5


@pytest.mark.parametrize("top_p", [0.0, 0.1, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("size", [7, 1000, 5003])
def test_top_p_keeps_what_transformers_keeps(size: int, top_p: float) -> None:
    logits, share = _logits(2, size), _given([top_p, top_p])
    ours = reference_rules.filter_logits(logits, top_p=share)
    theirs = TopPLogitsWarper(top_p)(torch.zeros(2, 1), logits)  # type: ignore[arg-type]
    assert not ((ours != theirs) & ~_probability_near(logits, share)).any()


@pytest.mark.parametrize("size", [7, 1000])
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"), [(0.7, 20, 0.9, 0.02), (1.3, 3, 0.6, 0.3), (1.0, 500, 0.95, 0.001)]
)
def test_the_order_is_that_of_transformers(size: int, temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    logits, ids = _logits(2, size), torch.zeros(2, 1, dtype=torch.long, device=DEVICE)
    expected = logits
    for warper in (TemperatureLogitsWarper(temperature), TopKLogitsWarper(top_k), TopPLogitsWarper(top_p), MinPLogitsWarper(min_p)):
        expected = warper(ids, expected)  # type: ignore[operator]
    two = torch.ones(2, device=DEVICE)
    found = _assert_same(logits, temperature=two * temperature, top_k=(two * top_k).long(), top_p=two * top_p, min_p=two * min_p)
    # On a GPU transformers multiplies by the reciprocal.
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_values_of_every_magnitude() -> None:
    """Halving values alone would need hundreds of passes here; -inf, denormals and both signs have their places too."""
    exponents = torch.linspace(-44, 38, 200)
    row = torch.cat((10.0**exponents, -(10.0**exponents), torch.tensor([0.0, -0.0, float("-inf"), float("-inf")])))
    logits = row[torch.randperm(len(row))].expand(6, -1).to(DEVICE)
    _assert_same(logits, top_k=_given([1, 150, 200, 202, 203, 403], torch.int64))
    _assert_same(logits * 1e-37, top_p=_given([0.0, 0.3, 0.5, 0.9, 0.99, 1.0]))


def test_the_edges_of_each_filter() -> None:
    """Top-p sums what top-k left, the most probable token stays, and a top-p of 1 keeps what has no probability in fp32."""
    logits = torch.tensor([0.1, 0.6, 1e-30, 0.4, 0.2], device=DEVICE).log().expand(2, 5)
    found = _assert_same(logits, top_k=_given([2, 2], torch.int64), top_p=_given([0.61, 0.59]))
    assert found.isfinite().sum(1).tolist() == [2, 1]
    assert _assert_same(logits, min_p=_given([2.0, 0.5])).isfinite().sum(1).tolist() == [1, 2]
    far = torch.tensor([[0.0, -200.0, -300.0]], device=DEVICE)
    assert torch.equal(_assert_same(far, top_p=_given([1.0])), far)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_a_row_without_a_law_keeps_all(bad: float) -> None:
    logits = _logits(2, 1000)
    logits[1, slice(None) if bad == float("-inf") else slice(7, 8)] = bad
    given = {"top_k": _given([3, 3], torch.int64), "top_p": _given([0.5, 0.5]), "min_p": _given([0.1, 0.1])}
    found = _assert_same(logits, **given)
    assert found[0].isfinite().sum() <= 3
    assert torch.equal(found[1].nan_to_num(nan=7.0), logits[1].nan_to_num(nan=7.0))


def test_equal_rows_keep_every_token() -> None:
    logits = torch.full((2, 5003), -2.5, device=DEVICE)
    found = _assert_same(logits, top_k=_given([1, 5], torch.int64), top_p=_given([0.1, 0.9]), min_p=_given([1.0, 0.5]))
    assert torch.equal(found, logits)


def test_a_row_is_filtered_alike_in_every_batch() -> None:
    logits = _logits(8, 5003)
    given = {"temperature": _given([0.8] * 8), "top_k": _given([900] * 8, torch.int64), "top_p": _given([0.9] * 8)}
    whole = filter_logits(logits, **given)
    assert torch.equal(whole[3:4], filter_logits(logits[3:4], **{name: value[3:4] for name, value in given.items()}))


def test_views_of_larger_tensors() -> None:
    whole = _logits(6, 300)
    _assert_same(whole[::2, 30:230], top_k=_given([9, 5, 7, 3, 1, 2], torch.int64)[::2], top_p=_given([0.9, 0.5, 0.3]))
