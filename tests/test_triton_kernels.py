"""Triton's kernels under the interpreter: every case against the oracle, through the public functions."""

from __future__ import annotations

import itertools
import math

import pytest
import tolerance
import torch
from cases import BY_NAME, CASES, DTYPES, Case, dtype_id, parameters_of
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from triton_interpreter import interpreted, needs_triton

import fastclip
from fastclip import reference
from fastclip.backends import Declined, cpu
from fastclip.backends import triton as backend

__all__ = ["interpreted"]


class Tagged(torch.Tensor):
    """A subclass that torch functions keep."""


pytestmark = [
    needs_triton,
    pytest.mark.usefixtures("interpreted"),
    # numpy, which stands in for the device, warns where the kernels overflow and divide on purpose.
    pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning"),
]

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)

TOO_LONG_TO_INTERPRET = {
    *("around_one_chunk", "many_chunks", "1200_tiny", "nan_in_many_chunks"),
    *("duplicates_in_many_chunks", "overlapping_in_many_chunks"),
}
SMALL_CASES = [case for case in CASES if case.dense and case.name not in TOO_LONG_TO_INTERPRET]
WRITABLE_CASES = [case for case in SMALL_CASES if not case.aliased]

# Each kind of norm in the type whose sums are hardest, and all types for the norm that matters most.
NORMS = [
    *((dtype, 2.0) for dtype in DTYPES),
    *((dtype, math.inf) for dtype in (torch.float32, torch.bfloat16)),
    (torch.float32, 1.0),
    (torch.float64, 3.0),
]
every_norm = pytest.mark.parametrize(
    ("dtype", "norm_type"), NORMS, ids=lambda v: str(v).removeprefix("torch.")
)

ROUNDINGS_IN_A_ROW = 4
"""In float32, before a sum is widened to float64; see _sum_rows."""


def norm_bound(tensors: list[Tensor], norm_type: float) -> float:
    """The bound of the CPU's kernels, whose sums are float64, and the roundings of the float32 rows."""
    if norm_type == math.inf:
        return tolerance.FLOAT32_UNIT
    numel = sum(t.numel() for t in tensors)
    wide = max((tolerance.norm(t.dtype, numel, norm_type) for t in tensors), default=0.0)
    return wide + ROUNDINGS_IN_A_ROW * tolerance.FLOAT32_UNIT / norm_type


@every_norm
@pytest.mark.parametrize("case", SMALL_CASES, ids=lambda case: case.name)
def test_total_norm(case: Case, dtype: torch.dtype, norm_type: float) -> None:
    tensors = case.tensors("cpu", dtype)
    if norm_type == math.inf and case.has_empty:
        with pytest.raises(fastclip.BackendUnavailableError, match="which has no inf-norm"):
            fastclip.get_total_norm(tensors, norm_type)
        return
    norm = fastclip.get_total_norm(tensors, norm_type)
    any_float64 = any(t.dtype == torch.float64 for t in tensors)
    assert norm.dtype == (torch.float64 if any_float64 else torch.float32)
    tolerance.assert_norm(norm, case.oracle_norm(dtype, norm_type), norm_bound(tensors, norm_type))


@pytest.mark.parametrize(
    ("dtype", "factor"),
    [*((dtype, 0.5) for dtype in DTYPES), (torch.float32, 2.0)],
    ids=["float32-active", "float64-active", "bfloat16-active", "float16-active", "float32-inactive"],
)
@pytest.mark.parametrize("case", WRITABLE_CASES, ids=lambda case: case.name)
def test_clip_grad_norm(case: Case, dtype: torch.dtype, factor: float) -> None:
    before, parameters = case.tensors("cpu", dtype), case.parameters("cpu", dtype)
    total_norm = reference.total_norm(before)
    max_norm = min(factor * total_norm, 1e300) if math.isfinite(total_norm) else 1.0
    returned = fastclip.clip_grad_norm_(parameters, max_norm)
    bound = norm_bound(before, 2.0)
    tolerance.assert_norm(returned, total_norm, bound)
    grads = [p.grad for p in parameters if p.grad is not None]
    for grad, was, want in zip(grads, before, reference.clipped(before, max_norm), strict=True):
        if reference.clip_coefficient(total_norm, max_norm) == 1.0:
            assert torch.equal(grad, was)
        else:
            tolerance.assert_scaled(
                grad, was, want, tolerance.scaled(dtype, bound) + tolerance.unit(was.dtype)
            )


@every_norm
@pytest.mark.parametrize("name", ["some_empty", "mixed_dtypes", "large_and_small", "inf_then_nan", "zeros"])
def test_grad_norms(name: str, dtype: torch.dtype, norm_type: float) -> None:
    tensors = BY_NAME[name].tensors("cpu", dtype)
    norms = fastclip.grad_norms(parameters_of(tensors), norm_type)
    assert norms.shape == (len(tensors),)
    for norm, tensor in zip(norms, tensors, strict=True):
        want = reference.total_norm([tensor], norm_type) if tensor.numel() else 0.0
        tolerance.assert_norm(norm, want, norm_bound([tensor], norm_type))


@every_dtype
@pytest.mark.parametrize("name", ["offset", "some_empty", "mixed_dtypes", "inf_then_nan", "zeros"])
def test_clip_grad_value(name: str, dtype: torch.dtype) -> None:
    ours, torchs = (BY_NAME[name].parameters("cpu", dtype) for _ in range(2))
    for clip_value in (0.7, -0.05):
        fastclip.clip_grad_value_(ours, clip_value)
        torch.nn.utils.clip_grad_value_(torchs, clip_value)
        for our, their in zip(ours, torchs, strict=True):
            torch.testing.assert_close(our.grad, their.grad, rtol=0, atol=0, equal_nan=True)


@every_dtype
@pytest.mark.parametrize("name", ["offset", "some_empty", "inf_then_nan", "minus_inf"])
def test_find_nonfinite(name: str, dtype: torch.dtype) -> None:
    parameters = BY_NAME[name].parameters("cpu", dtype)
    want = {
        str(i): (int(p.grad.isnan().sum()), int(p.grad.isinf().sum()))
        for i, p in enumerate(parameters)
        if p.grad is not None and not bool(p.grad.isfinite().all())
    }
    assert fastclip.find_nonfinite((str(i), p) for i, p in enumerate(parameters)) == want


def test_find_nonfinite_counts_a_chunk_of_them() -> None:
    parameters = parameters_of([torch.full((700,), math.nan), torch.full((900,), -math.inf)])
    assert fastclip.find_nonfinite(zip("ab", parameters, strict=True)) == {"a": (700, 0), "b": (0, 900)}


@pytest.mark.parametrize("total_norm", [8.0, 0.5, math.inf, math.nan, torch.tensor(8.0, dtype=torch.float64)])
def test_clip_grads_with_norm(total_norm: float | Tensor) -> None:
    before, parameters = (BY_NAME["mixed_dtypes"].tensors("cpu", torch.float32) for _ in range(2))
    parameters = parameters_of(parameters)
    total_norm = torch.as_tensor(total_norm)
    fastclip.clip_grads_with_norm_(parameters, 2.0, total_norm)
    coefficient = reference.clip_coefficient(total_norm.item(), 2.0)
    for parameter, was in zip(parameters, before, strict=True):
        want = was.double() * coefficient
        tolerance.assert_scaled(parameter.grad, was, want, tolerance.scaled(was.dtype, 0.0))


@pytest.mark.parametrize("case", [c for c in SMALL_CASES if c.aliased], ids=lambda case: case.name)
def test_aliased_gradients_are_declined_before_anything_is_written(case: Case) -> None:
    before, parameters = case.tensors("cpu", torch.float32), case.parameters("cpu", torch.float32)
    calls = (
        lambda: fastclip.clip_grad_norm_(parameters, 1e-3),
        lambda: fastclip.clip_grads_with_norm_(parameters, 1e-3, torch.tensor(1.0)),
        lambda: fastclip.clip_grad_value_(parameters, 1e-3),
    )
    for call in calls:
        with pytest.raises(fastclip.BackendUnavailableError, match="two gradients share memory"):
            call()
    assert all(torch.equal(p.grad, was) for p, was in zip(parameters, before, strict=True))


def test_many_tiny_tensors() -> None:
    tensors = BY_NAME["1200_tiny"].tensors("cpu", torch.bfloat16)[:300]
    norm = fastclip.get_total_norm(tensors)
    tolerance.assert_norm(norm, reference.total_norm(tensors), norm_bound(tensors, 2.0))


@every_dtype
def test_lengths_around_tile_and_chunk_at_every_misalignment(dtype: torch.dtype) -> None:
    """Neighbouring memory is nan: neither read nor written."""
    vector = 16 // dtype.itemsize
    tile, chunk = 32 * vector, 64 * vector
    lengths = (1, vector - 1, vector, tile + 1, chunk - 1, 2 * chunk + 1)
    memories, views = [], []
    for start, numel in itertools.product(range(vector + 1), lengths):
        memory = torch.full((start + numel + 2 * vector,), math.nan, dtype=dtype)
        memory[start : start + numel] = 1.0
        memories.append(memory)
        views.append(memory[start : start + numel])
    assert {v.data_ptr() % 16 for v in views} == set(range(0, 16, dtype.itemsize))
    numel = sum(v.numel() for v in views)
    norm = fastclip.clip_grad_norm_(parameters_of(views), 0.25 * math.sqrt(numel))
    assert norm.item() == pytest.approx(math.sqrt(numel), rel=1e-7)
    for memory, view in zip(memories, views, strict=True):
        torch.testing.assert_close(view, torch.full_like(view, 0.25), rtol=1e-6, atol=0)
        assert int(memory.isnan().sum()) == memory.numel() - view.numel()


@pytest.mark.parametrize("value", [1.0 + 2**-7, 0.1, 1 / 3, 0.99951171875, 1000.1, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_id)
def test_accepted_error_of_constants(dtype: torch.dtype, value: float) -> None:
    for norm_type, numel in itertools.product((1.0, 2.0), (7, 2001)):
        tensor = torch.full((numel,), value, dtype=dtype)
        want = reference.total_norm([tensor], norm_type)
        error = abs(fastclip.get_total_norm(tensor, norm_type).item() - want)
        limit = tolerance.ACCEPTED_NORM_ERROR * (2 if norm_type == 1.0 else 1)
        assert error <= limit * want, (norm_type, numel)


@pytest.mark.parametrize("value", [1.7e-20, 3e-22, 2.5e-19, 1.5e19])
def test_squares_that_float32_can_hold_but_not_well(value: float) -> None:
    """Subnormal squares have few bits, and sums of the largest overflow though no square does."""
    tensor = torch.full((300,), value)
    want = reference.total_norm([tensor])
    assert fastclip.get_total_norm(tensor).item() == pytest.approx(
        want, rel=tolerance.ACCEPTED_NORM_ERROR, abs=0
    )


def test_same_bits_on_every_run() -> None:
    tensors = BY_NAME["mixed_dtypes"].tensors("cpu", torch.float32)
    for norm_type in (1.0, 2.0, math.inf, 2.5):
        norms = {fastclip.get_total_norm(tensors, norm_type).item() for _ in range(3)}
        assert len(norms) == 1, norm_type


@pytest.mark.parametrize("max_norm", [math.inf, math.nan, 0.0, 1e-30])
@pytest.mark.parametrize("value", [1.0, math.inf, math.nan])
def test_thresholds(value: float, max_norm: float) -> None:
    parameters, before = parameters_of([torch.tensor([value, -2.0])]), torch.tensor([value, -2.0])
    fastclip.clip_grad_norm_(parameters, max_norm)
    want = reference.clipped([before], max_norm)[0].to(torch.float32)
    torch.testing.assert_close(parameters[0].grad, want, rtol=1e-6, atol=0, equal_nan=True)


def test_error_if_nonfinite_leaves_gradients_untouched() -> None:
    parameters = parameters_of([torch.ones(3), torch.tensor([1.0, math.inf])])
    with pytest.raises(RuntimeError, match=r"non-finite.*position 1, shape"):
        fastclip.clip_grad_norm_(parameters, 0.1, error_if_nonfinite=True)
    assert torch.equal(parameters[0].grad, torch.ones(3))
    assert math.isinf(parameters[1].grad[1])


def test_versions_rise_where_a_kernel_may_have_written() -> None:
    parameters = parameters_of([torch.ones(3)])
    grad = parameters[0].grad
    fastclip.get_total_norm([grad])
    fastclip.clip_grad_norm_(parameters, math.inf)
    assert grad._version == 0
    fastclip.clip_grad_norm_(parameters, 0.5)
    fastclip.clip_grad_value_(parameters, 0.1)
    assert grad._version == 2


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (torch.ones(4, dtype=torch.complex64), "is not float16"),
        (torch.ones(4, dtype=torch.int32), "is not float16"),
        (torch.eye(3).to_sparse(), "has no plain memory"),
        (torch.ones(4)[::2], "is not dense in memory"),
        (torch.ones(1).expand(4), "is not dense in memory"),
        (torch.ones(4, device="meta"), "has no plain memory|is not on the CPU"),
        (torch.ones(4).as_subclass(Tagged), r"Tagged\) is not a plain torch.Tensor"),
        (FakeTensorMode().from_tensor(torch.ones(4)), r"FakeTensor\) is not a plain torch.Tensor"),
    ],
    ids=["complex", "integer", "sparse", "every_second", "expanded", "meta", "subclass", "fake"],
)
def test_what_the_kernels_cannot_take_is_declined(tensor: Tensor, reason: str) -> None:
    with pytest.raises(fastclip.BackendUnavailableError, match=reason):
        fastclip.get_total_norm([tensor])


def test_what_functorch_wraps_is_declined() -> None:
    with pytest.raises(fastclip.BackendUnavailableError, match="has no plain memory"):
        torch.func.vmap(lambda x: fastclip.get_total_norm([x]))(torch.ones(3, 4))


def test_a_lazily_negated_view_is_measured_and_not_clamped() -> None:
    grad = torch._neg_view(torch.tensor([3.0, -4.0]))
    assert fastclip.get_total_norm([grad]) == 5.0
    (parameter,) = parameters_of([grad])
    with pytest.raises(fastclip.BackendUnavailableError, match="lazily negated"):
        fastclip.clip_grad_value_([parameter], 1.0)
    assert parameter.grad.tolist() == [-3.0, 4.0]


def test_backend_info_says_that_it_is_interpreted() -> None:
    info = fastclip.backend_info()["triton"]
    assert info.available
    assert "interpreted" in info.details["devices"]


def test_without_the_extension_its_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_reason", "the extension is elsewhere")
    assert backend.unavailable_reason() == "the extension is elsewhere"
    assert backend.details() == {}


@pytest.mark.parametrize(("hip", "expected"), [("6.4", "is not on a ROCm device"), (None, "a CUDA device")])
def test_tensors_are_looked_for_on_the_devices_of_torch(
    hip: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(torch.version, "hip", hip)
    declined = backend.total_norm([torch.ones(3)], 2.0)
    assert isinstance(declined, Declined)
    assert expected in declined.reason
