"""The compaction kernel against its twin: in Triton's interpreter on a CPU, compiled on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from specdec.kernels import reference, reference_rules
from specdec.kernels.kv_compact import kv_compact

pytestmark = pytest.mark.slow

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.uint8]


def _cache(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Every element differs from its neighbours, in every dtype."""
    count = torch.Size(shape).numel()
    return (torch.arange(count) * 37 % 251).to(dtype).view(shape).to(DEVICE)


def _ints(values: object) -> Tensor:
    return torch.tensor(values, device=DEVICE)


def _random_path(nodes: int, count: int) -> list[int]:
    return sorted((torch.randperm(nodes - 1)[:count] + 1).tolist())


def _assert_equal(cache: Tensor, lengths: list[int], paths: list[list[int]], counts: list[int]) -> None:
    ours, theirs = cache.clone(), cache.clone()
    arguments = _ints(lengths), _ints(paths), _ints(counts)
    kv_compact(ours, *arguments)
    reference_rules.kv_compact(theirs, *arguments)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 24, 80, 128])
def test_dtypes_and_widths(dtype: torch.dtype, width: int) -> None:
    _assert_equal(_cache(2, 2, 2, 3, 12, width, dtype=dtype), [4, 1], [[2, 3, 5], [1, 4, 9]], [3, 2])


@pytest.mark.parametrize(
    "path",
    [[1], [5], [1, 2, 3, 4], [2, 3, 4, 5, 6], [1, 3, 4, 5], [2, 4, 6, 8], [9]],
    ids=str,
)
def test_overlapping_and_identity_moves(path: list[int]) -> None:
    for count in range(len(path) + 1):
        _assert_equal(_cache(1, 2, 1, 2, 20, 16), [7], [path], [count])


@pytest.mark.parametrize("depth", [1, 16, 17, 63, 64, 65, 150])
def test_long_paths_go_in_several_tiles(depth: int) -> None:
    paths = [_random_path(200, depth), _random_path(depth + 1, depth)]
    _assert_equal(_cache(1, 2, 2, 1, 210, 40), [3, 9], paths, [depth, max(depth - 2, 0)])


def test_wide_rows_of_long_paths_go_in_several_tiles() -> None:
    _assert_equal(_cache(1, 2, 1, 2, 80, 256), [2], [_random_path(70, 64)], [64])


@pytest.mark.parametrize("batch", [1, 3])
def test_random_paths(batch: int) -> None:
    counts = torch.randint(0, 8, (batch,)).tolist()
    lengths = torch.randint(0, 30, (batch,)).tolist()
    _assert_equal(_cache(3, 2, batch, 2, 60, 32), lengths, [_random_path(24, 8) for _ in range(batch)], counts)


def test_what_stands_behind_the_path_is_not_read() -> None:
    cache = _cache(1, 2, 2, 1, 10, 8)
    before = cache.clone()
    kv_compact(cache, _ints([2, 5]), _ints([[3, 99999], [-7, 1 << 40]]), _ints([1, 0]))
    before[:, :, 0, :, 3] = before[:, :, 0, :, 5]
    assert torch.equal(cache, before)


def test_no_path_and_no_requests() -> None:
    cache = _cache(1, 2, 2, 1, 10, 8)
    before = cache.clone()
    kv_compact(cache, _ints([2, 5]), _ints([[], []]).long(), _ints([0, 0]))
    kv_compact(cache, *(torch.empty(shape, dtype=torch.int64, device=DEVICE) for shape in ((0,), (0, 3), (0,))))
    assert torch.equal(cache, before)


def test_any_strides_and_more_cache_rows_than_requests() -> None:
    whole = _cache(2, 2, 14, 4, 3, 48)
    view = whole.permute(0, 1, 3, 4, 2, 5)[..., :40]
    expected = view.clone()
    arguments = _ints([2, 0, 4]), _ints([[2, 5, 6], [1, 3, 13], [4, 5, 6]]), _ints([3, 3, 2])
    reference_rules.kv_compact(expected, *arguments)
    rest = whole[..., 40:].clone()
    kv_compact(view, *arguments)
    assert torch.equal(view, expected)
    assert torch.equal(whole[..., 40:], rest)


def test_the_same_as_the_move_of_the_cache() -> None:
    """`reference.kv_compact` is told every move; the kernel finds them itself."""
    ours, theirs = _cache(2, 2, 2, 2, 16, 8), _cache(2, 2, 2, 2, 16, 8)
    kv_compact(ours, _ints([3, 5]), _ints([[2, 3, 6], [1, 4, 0]]), _ints([3, 2]))
    reference.kv_compact(theirs, _ints([0, 0, 0, 1]), _ints([5, 6, 9, 9]), _ints([4, 5, 6, 7]))
    assert torch.equal(ours, theirs)
