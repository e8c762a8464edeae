"""The C interface of the CUDA kernels, compiled for the CPU: layouts, launches, grids, what is written."""

from __future__ import annotations

import ctypes
import math

import cuda_library
import pytest
import tolerance
import torch
from cuda_library import DTYPES, ITEM_SIZES, CudaError, Library, Span

from fastclip import reference

pytestmark = pytest.mark.skipif(cuda_library.compiler() is None, reason="needs g++ with _Float16")

INF, NAN = math.inf, math.nan
TILE_BYTES = 16 * 1024
NORM_TYPES = (1.0, 2.0, INF, 0.5, 3.0)


@pytest.fixture
def library() -> Library:
    built = cuda_library.built()
    built.device, built.stream = 0, 1
    return built


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def random(numel: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(numel, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def norm_error(tensors: list[torch.Tensor], norm_type: float) -> float:
    """Return the relative bound for the p-norm of all tensors together."""
    numel = sum(t.numel() for t in tensors)
    return max((tolerance.norm(t.dtype, numel, norm_type, "cuda") for t in tensors), default=0.0)


def assert_norm(actual: torch.Tensor, tensors: list[torch.Tensor], norm_type: float) -> None:
    expected = reference.total_norm(tensors, norm_type)
    tolerance.assert_norm(actual, expected, norm_error(tensors, norm_type), f"p={norm_type:g}")


def lengths(dtype: torch.dtype) -> list[int]:
    """Return lengths around the 16-byte vector, the block's step and the tile."""
    vector, tile = 16 // ITEM_SIZES[dtype], TILE_BYTES // ITEM_SIZES[dtype]
    around = [n + d for n in (vector, 256 * vector, tile, 3 * tile) for d in (-1, 0, 1)]
    return sorted({0, 1, *around, 40 * tile + 5})


@pytest.mark.parametrize("norm_type", [1.0, 2.0, INF])
def test_total_norm_of_every_length(library: Library, dtype: torch.dtype, norm_type: float) -> None:
    for numel in lengths(dtype):
        tensors = [random(numel, dtype, seed=numel)]
        norm, _ = library.total_norm(tensors, norm_type)
        assert_norm(norm, tensors, norm_type)


@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_total_norm_of_mixed_dtypes_and_empty_spans(library: Library, norm_type: float) -> None:
    sizes = (3, 0, 5000, 17, 0, 0, 20_000, 1, 0)
    tensors = [random(n, list(DTYPES)[i % 4], seed=i) for i, n in enumerate(sizes)]
    assert_norm(library.total_norm(tensors, norm_type)[0], tensors, norm_type)
    singles = [t for t in tensors if t.dtype != torch.float64]
    assert_norm(library.total_norm(singles, norm_type)[0], singles, norm_type)


def test_stages_give_the_bits_of_the_whole(library: Library, dtype: torch.dtype) -> None:
    whole = [random(30_000, dtype), random(77, dtype)]
    staged = [t.clone() for t in whole]
    norm = library.clip_grad_norm(whole, 0.25)
    staged_norm, coefficient = library.total_norm(staged, max_norm=0.25)
    library.scale(staged, coefficient)
    assert torch.equal(norm, staged_norm)
    assert all(torch.equal(a, b) for a, b in zip(whole, staged, strict=True))


@pytest.mark.parametrize("num_repeats", [2, 3])
def test_spans_that_share_memory_take_turns(library: Library, num_repeats: int) -> None:
    grad = random(40_000, torch.float32)
    overlapping = [grad[:30_000], grad[10_000:]]
    expected = grad.clone()
    expected[:30_000] *= 0.5
    expected[10_000:] *= 0.5
    library.scale(overlapping, 0.5)
    assert torch.equal(grad, expected)
    library.scale([grad] * num_repeats, 0.5)
    assert torch.equal(grad, expected * 0.5**num_repeats)


@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_norms_of_spans(library: Library, norm_type: float) -> None:
    # Several blocks in one span, several spans in one block, and empty ones at both ends and between.
    sizes = (0, 70_000, 3, 0, 0, 4096, 1, *[5] * 40, 9000, 0)
    tensors = [random(n, torch.bfloat16 if i % 3 else torch.float32, seed=i) for i, n in enumerate(sizes)]
    for actual, tensor in zip(library.norms(tensors, norm_type), tensors, strict=True):
        assert_norm(actual, [tensor], norm_type)
    assert library.count_nonfinite(tensors) == [(0, 0)] * len(tensors)


@pytest.mark.parametrize(("max_norm", "num_launches"), [(0.5, 2), (1e9, 2), (INF, 1)])
def test_launches_of_a_clip(library: Library, max_norm: float, num_launches: int) -> None:
    tensors = [random(50_000, torch.float32), random(25_000, torch.float32, seed=1)[1:]]
    library.total_norm(tensors)
    launches = library.num_launches
    library.clip_grad_norm(tensors, max_norm)
    assert library.num_launches - launches == num_launches


def test_devices_have_grids_of_their_own(library: Library) -> None:
    tensors = [random(200_000, torch.float32)]
    for library.device in (0, 1):
        assert_norm(library.total_norm(tensors)[0], tensors, 2.0)
        assert library.c.emulation_device() == 0, "the caller's device was not restored"


def test_messages(library: Library) -> None:
    with pytest.raises(CudaError, match="norm_type is not positive"):
        library.total_norm([torch.ones(1)], 0.0)
    misaligned = Span(torch.ones(2).data_ptr() + 1, 1, DTYPES[torch.float32])
    unknown = Span(torch.ones(2).data_ptr(), 1, 4)
    for span, message in ((misaligned, "multiple of its element size"), (unknown, "dtype is not float16")):
        call = library.call([])
        call.spans, call.num_spans = (Span * 1)(span), 1
        with pytest.raises(CudaError, match=message):
            library.check(
                library.c.fastclip_cuda_elementwise(ctypes.byref(call), b"clamp", ctypes.c_double(1.0), None)
            )
    with pytest.raises(CudaError, match="no such elementwise operation"):
        library.check(
            library.c.fastclip_cuda_elementwise(
                ctypes.byref(library.call([])), b"scale", ctypes.c_double(1.0), None
            )
        )


@pytest.mark.large
def test_more_than_2_to_the_31_elements(library: Library) -> None:
    tensor = torch.zeros(2**31 + 5000, dtype=torch.bfloat16)
    places = torch.tensor([0, 2**31 - 1, 2**31, 2**31 + 4999])
    tensor[places] = torch.tensor([2.0, 4.0, 4.0, 8.0], dtype=torch.bfloat16)
    assert library.clip_grad_norm([tensor], 5.0).item() == 10.0
    assert tensor[places].tolist() == [1.0, 2.0, 2.0, 4.0]
    assert library.count_nonfinite([tensor]) == [(0, 0)]
