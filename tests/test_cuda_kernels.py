"""The CUDA kernels, compiled for the CPU, against the float64 definitions."""

from __future__ import annotations

import ctypes
import math

import cuda_library
import pytest
import tolerance
import torch
from cases import Case, select
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


@pytest.mark.parametrize("case", select(dense=True), ids=lambda case: case.name)
def test_the_cases_of_every_backend(library: Library, dtype: torch.dtype, case: Case) -> None:
    if dtype not in case.dtypes:
        pytest.skip("needs a dtype for which the case means something")
    tensors = case.tensors("cpu", dtype)
    for norm_type in NORM_TYPES:
        norm, _ = library.total_norm(tensors, norm_type)
        wanted = case.oracle_norm(dtype, norm_type)
        tolerance.assert_norm(norm, wanted, norm_error(tensors, norm_type), f"p={norm_type:g}")

    clipped = case.tensors("cpu", dtype)
    library.clip_grad_norm(clipped, 0.7)
    if case.aliased:
        return  # what is scaled twice has a test of its own
    for actual, before, wanted in zip(clipped, tensors, reference.clipped(tensors, 0.7), strict=True):
        relative = tolerance.scaled(actual.dtype, norm_error(tensors, 2.0))
        tolerance.assert_scaled(actual, before, wanted, relative)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, INF])
def test_total_norm_of_every_length(library: Library, dtype: torch.dtype, norm_type: float) -> None:
    for numel in lengths(dtype):
        tensors = [random(numel, dtype, seed=numel)]
        norm, _ = library.total_norm(tensors, norm_type)
        assert_norm(norm, tensors, norm_type)


def test_total_norm_at_every_misalignment(library: Library, dtype: torch.dtype) -> None:
    base = random(TILE_BYTES // ITEM_SIZES[dtype] * 2 + 64, dtype)
    for offset in range(16 // ITEM_SIZES[dtype] + 1):
        for numel in (1, 7, 8, 9, 100, base.numel() - 20):
            tensors = [base[offset : offset + numel]]
            assert_norm(library.total_norm(tensors)[0], tensors, 2.0)


@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_total_norm_of_mixed_dtypes_and_empty_spans(library: Library, norm_type: float) -> None:
    sizes = (3, 0, 5000, 17, 0, 0, 20_000, 1, 0)
    tensors = [random(n, list(DTYPES)[i % 4], seed=i) for i, n in enumerate(sizes)]
    assert_norm(library.total_norm(tensors, norm_type)[0], tensors, norm_type)
    singles = [t for t in tensors if t.dtype != torch.float64]
    assert_norm(library.total_norm(singles, norm_type)[0], singles, norm_type)


@pytest.mark.parametrize("tensors", [[], [torch.empty(0)]], ids=["none", "empty"])
def test_total_norm_of_nothing_is_zero(library: Library, tensors: list[torch.Tensor]) -> None:
    norm, coefficient = library.total_norm(tensors)
    assert (norm.item(), coefficient) == (0.0, 1.0)


EXTREMES = {
    "float32-squares-overflow": (torch.float32, [1e30, -3e38, 2e20]),
    "float32-one-large": (torch.float32, [6e31, 1.0]),
    "float32-squares-underflow": (torch.float32, [1e-30, -2e-30]),
    "float32-squares-subnormal": (torch.float32, [1.1e-21, 1.3e-21, -1.7e-21]),
    "float32-subnormal": (torch.float32, [1.4e-45, 2.8e-45]),
    "float32-near-the-refused-sum": (torch.float32, [2.0**-50, 2.0**-51, 2.0**-49]),
    "bfloat16-squares-overflow": (torch.bfloat16, [1e30, 3e38]),
    "bfloat16-squares-underflow": (torch.bfloat16, [1e-30, 1e-40]),
    "float16-largest": (torch.float16, [65504.0, -65504.0]),
    "float16-subnormal": (torch.float16, [6e-8, 1.2e-7]),
    "float64-squares-overflow": (torch.float64, [1e200, -1e300, 1e-300]),
    "float64-squares-underflow": (torch.float64, [1e-200, 1e-310, -3e-170]),
    "float64-subnormal": (torch.float64, [5e-324, 1e-323]),
    "float64-across-the-ranges": (torch.float64, [1e-140, 1e-130, 1e-160]),
    "float64-around-the-upper-range": (torch.float64, [1e130, 1e136, 1e140]),
    "negative-zero": (torch.float32, [-0.0, 0.0]),
    "inf": (torch.float32, [INF, 1.0]),
    "minus-inf": (torch.bfloat16, [-INF, 1.0]),
    "nan": (torch.float16, [NAN, 1.0]),
    "nan-and-inf": (torch.float64, [NAN, INF, 1e300]),
}


@pytest.mark.parametrize("norm_type", [*NORM_TYPES, 40.0])
@pytest.mark.parametrize("case", EXTREMES)
def test_total_norm_of_extreme_values(library: Library, case: str, norm_type: float) -> None:
    dtype, values = EXTREMES[case]
    alone = [torch.tensor(values, dtype=dtype)]
    # Among zeros, so that every position of a vector and the scalars behind it are met.
    scattered = [torch.zeros(3001, dtype=dtype).index_put((torch.arange(len(values)) * 1499,), alone[0])]
    repeated = [alone[0].repeat(700)]
    for tensors in (alone, scattered, repeated):
        assert_norm(library.total_norm(tensors, norm_type)[0], tensors, norm_type)


def test_norm_beyond_float32_is_returned_as_inf_but_clips_rightly(library: Library) -> None:
    tensors = [torch.full((1000,), 3e38)]
    norm = library.clip_grad_norm(tensors, 1.0)
    assert norm.item() == INF
    assert tensors[0].double().norm().item() == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("numel", [13, 50_000])
@pytest.mark.parametrize("max_norm", [0.0, 0.5, -1.0, 1e9, NAN, INF])
def test_clip_grad_norm(library: Library, dtype: torch.dtype, max_norm: float, numel: int) -> None:
    tensors = [random(numel, dtype), random(numel // 2, dtype, seed=1)[1:]]
    before = [t.clone() for t in tensors]
    launches = library.num_launches
    norm = library.clip_grad_norm(tensors, max_norm)
    assert library.num_launches - launches == (1 if max_norm == INF else 2)
    assert_norm(norm, before, 2.0)
    coefficient = (
        1.0 if max_norm == INF else reference.clip_coefficient(reference.total_norm(before), max_norm)
    )
    for actual, original in zip(tensors, before, strict=True):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        factor = torch.tensor(coefficient, dtype=wide)
        expected = (original.to(wide) * factor).to(dtype) if coefficient != 1.0 else original
        exponent = 2.0**-51 if dtype == torch.float64 else torch.finfo(dtype).eps + 2.0**-22
        torch.testing.assert_close(actual, expected, rtol=exponent, atol=0, equal_nan=True)
        if coefficient == 1.0:
            assert torch.equal(actual, original)


@pytest.mark.parametrize("poison", [NAN, INF, -INF], ids=str)
def test_clipping_by_a_nonfinite_norm(library: Library, dtype: torch.dtype, poison: float) -> None:
    tensors = [random(3000, dtype), random(5, dtype)]
    tensors[0][1234] = poison
    norm = library.clip_grad_norm(tensors, 1.0)
    if math.isnan(poison):
        assert math.isnan(norm.item())
        assert all(bool(t.isnan().all()) for t in tensors)
    else:
        assert norm.item() == INF
        assert bool(tensors[0][1234].isnan())
        tensors[0][1234] = 0
        assert not any(bool(t.any()) for t in tensors)


def test_infinite_max_norm_leaves_nonfinite_gradients(library: Library) -> None:
    tensors = [torch.tensor([NAN, INF, 1.0])]
    norm, coefficient = library.total_norm(tensors, max_norm=INF)
    assert math.isnan(norm.item())
    assert coefficient == 1.0
    library.clip_grad_norm(tensors, INF)
    library.clip_grads_with_norm(tensors, INF, norm)
    assert str(tensors[0].tolist()) == "[nan, inf, 1.0]"


def test_stages_give_the_bits_of_the_whole(library: Library, dtype: torch.dtype) -> None:
    whole = [random(30_000, dtype), random(77, dtype)]
    staged = [t.clone() for t in whole]
    norm = library.clip_grad_norm(whole, 0.25)
    staged_norm, coefficient = library.total_norm(staged, max_norm=0.25)
    library.scale(staged, coefficient)
    assert torch.equal(norm, staged_norm)
    assert all(torch.equal(a, b) for a, b in zip(whole, staged, strict=True))


@pytest.mark.parametrize("norm_dtype", [torch.float32, torch.float64], ids=str)
def test_clip_grads_with_norm(library: Library, norm_dtype: torch.dtype) -> None:
    tensors = [torch.arange(1.0, 6000.0)]
    expected = tensors[0] * torch.tensor(reference.clip_coefficient(8.0, 2.0), dtype=torch.float32)
    library.clip_grads_with_norm(tensors, 2.0, torch.tensor(8.0, dtype=norm_dtype))
    assert torch.equal(tensors[0], expected)
    library.clip_grads_with_norm(tensors, 2.0, torch.tensor(1.0, dtype=norm_dtype))
    assert torch.equal(tensors[0], expected)


def test_scaling_rounds_once(library: Library, dtype: torch.dtype) -> None:
    tensors = [random(9001, dtype)[1:]]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected = (tensors[0].to(wide) * torch.tensor(1 / 3, dtype=wide)).to(dtype)
    library.scale(tensors, 1 / 3)
    assert torch.equal(tensors[0], expected)


def test_neighbours_of_a_misaligned_span_stay(library: Library, dtype: torch.dtype) -> None:
    for offset in range(1, 16 // ITEM_SIZES[dtype] + 1):
        base = random(5000, dtype)
        expected = base.clone()
        expected[offset:-offset] *= 2
        library.scale([base[offset:-offset]], 2.0)
        assert torch.equal(base, expected)


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


def test_norms_of_float64_spans(library: Library) -> None:
    tensors = [
        torch.tensor([3e200, 4e200], dtype=torch.float64),
        torch.tensor([NAN]),
        torch.tensor([6.0, 8.0]),
    ]
    for actual, tensor in zip(library.norms(tensors), tensors, strict=True):
        assert_norm(actual, [tensor], 2.0)


def test_count_nonfinite(library: Library, dtype: torch.dtype) -> None:
    tensors = [random(20_000, dtype), random(3, dtype), torch.empty(0, dtype=dtype), random(4097, dtype)[1:]]
    tensors[0][::1000] = NAN
    tensors[0][1::5000] = -INF
    tensors[3][-1] = INF
    assert library.count_nonfinite(tensors) == [(20, 4), (0, 0), (0, 0), (0, 1)]


@pytest.mark.parametrize("limit", [0.1, 0.0, -0.5, INF])
def test_clamp(library: Library, dtype: torch.dtype, limit: float) -> None:
    tensors = [random(9001, dtype)[1:], random(3, dtype)]
    tensors[0][:3] = torch.tensor([NAN, INF, -INF])
    expected = [t.clone().clamp_(-limit, limit) for t in tensors]
    library.clamp(tensors, limit)
    for actual, wanted in zip(tensors, expected, strict=True):
        assert torch.equal(actual.nan_to_num(7.0), wanted.nan_to_num(7.0))


def test_repeated_runs_give_the_same_bits(library: Library, dtype: torch.dtype) -> None:
    tensors = [random(12_345, dtype, seed=i) for i in range(5)]
    norms = {library.total_norm(tensors)[0].item().hex() for _ in range(3)}
    assert len(norms) == 1


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
            library.check(library.c.fastclip_cuda_clamp(ctypes.byref(call), ctypes.c_double(1.0)))


@pytest.mark.large
def test_more_than_2_to_the_31_elements(library: Library) -> None:
    tensor = torch.zeros(2**31 + 5000, dtype=torch.bfloat16)
    places = torch.tensor([0, 2**31 - 1, 2**31, 2**31 + 4999])
    tensor[places] = torch.tensor([2.0, 4.0, 4.0, 8.0], dtype=torch.bfloat16)
    assert library.clip_grad_norm([tensor], 5.0).item() == 10.0
    assert tensor[places].tolist() == [1.0, 2.0, 2.0, 4.0]
    assert library.count_nonfinite([tensor]) == [(0, 0)]
