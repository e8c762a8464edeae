"""Lists on several devices: emulated CUDA devices, Triton's interpreter and, where there are two, GPUs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import cuda_library
import pytest
import tolerance
import torch
from cuda_library import Devices
from triton_interpreter import interpreted, needs_triton

import fastclip
from fastclip import backends, reference
from fastclip.backends import cpu, eager, triton
from fastclip.backends import devices as placing
from fastclip.backends.base import Declined

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NUMELS = (5, 9000, 1, 3000, 70, 12, 4097)
PLACES = (0, 1, 1, 0, 1, None, 0)
"""Devices of the tensors; None is the CPU."""
MAX_NORM = 0.5

needs_emulation = [
    pytest.mark.skipif(cpu._C is None, reason="needs the C++ extension"),
    pytest.mark.skipif(cuda_library.compiler() is None, reason="needs g++ with _Float16"),
]

__all__ = ["interpreted"]  # a fixture
Make = Callable[..., list[torch.nn.Parameter]]


def values(dtypes: tuple[torch.dtype, ...] = DTYPES) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(numel, dtype=torch.float64, generator=generator).to(dtypes[i % len(dtypes)])
        for i, numel in enumerate(NUMELS)
    ]


def forbid_eager(patch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("eager ran")

    for operation in ("total_norm", "grad_norms", "count_nonfinite", *placing.WRITING):
        patch.setattr(eager, operation, refuse)


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> Iterator[Devices]:
    with cuda_library.emulated_devices() as emulated:
        forbid_eager(monkeypatch)
        yield emulated


def on(
    devices: Devices, grads: list[torch.Tensor], places: tuple[int | None, ...] = PLACES
) -> list[torch.nn.Parameter]:
    parameters = [torch.nn.Parameter(torch.zeros_like(grad)) for grad in grads]
    for parameter, grad, place in zip(parameters, grads, places, strict=False):
        parameter.grad = devices.place(grad, place)
    return parameters


def check_every_operation(
    make: Make, dtypes: tuple[torch.dtype, ...], norm_types: tuple[float, ...] = (1.0, 2.0, 2.5, math.inf)
) -> None:
    """Compare with the float64 definitions; make(grads) gives parameters with these, somewhere."""
    plain = values(dtypes)
    wide = max((max(t.numel() for t in plain), sum(t.numel() for t in plain)))
    for norm_type in norm_types:
        bound = max(tolerance.norm(t.dtype, wide, norm_type, "cuda") for t in plain)
        want = reference.total_norm(plain, norm_type)
        parameters = make(values(dtypes))
        grads = [p.grad for p in parameters if p.grad is not None]
        norm = fastclip.get_total_norm(grads, norm_type)
        assert norm.device == grads[0].device
        assert norm.dtype == (torch.float64 if torch.float64 in dtypes else torch.float32)
        tolerance.assert_norm(norm, want, bound, f"p={norm_type}")
        norms = fastclip.grad_norms(parameters, norm_type)
        assert norms.dtype == norm.dtype
        for ours, tensor in zip(norms, plain, strict=True):
            tolerance.assert_norm(ours, reference.total_norm([tensor], norm_type), bound, f"p={norm_type}")
        versions = [g._version for g in grads]
        clipped = fastclip.clip_grad_norm_(parameters, MAX_NORM, norm_type)
        assert torch.equal(clipped, norm)
        assert all(g._version > before for g, before in zip(grads, versions, strict=True))
        coefficient = reference.clip_coefficient(want, MAX_NORM)
        again = make(values(dtypes))
        fastclip.clip_grads_with_norm_(again, MAX_NORM, norm)
        for grad, other, before in zip(grads, again, plain, strict=True):
            near = {"rtol": 8 * bound + 2 * torch.finfo(before.dtype).eps, "atol": 1e-6}
            torch.testing.assert_close(grad.cpu().double(), before.double() * coefficient, **near)
            assert other.grad is not None
            torch.testing.assert_close(other.grad.cpu().double(), before.double() * coefficient, **near)
    every = torch.linspace(0.25, 0.75, len(plain), dtype=torch.float64)
    for coefs in (torch.tensor([0.5], dtype=torch.float64), every):
        parameters = make(values(dtypes))
        first = parameters[0].grad
        assert first is not None
        backends.run(backends.Backend.scale_grads_, parameters, coefs.to(first.device))
        for parameter, before, coef in zip(parameters, plain, coefs.expand(len(plain)), strict=True):
            assert parameter.grad is not None
            near = {"rtol": 4 * torch.finfo(before.dtype).eps, "atol": 1e-7}
            torch.testing.assert_close(parameter.grad.cpu().double(), before.double() * coef, **near)
    for on_device in (False, True):
        parameters = make(values(dtypes))
        if on_device:
            first = parameters[0].grad
            assert first is not None
            limit = torch.tensor(0.25, device=first.device)
            backends.run(backends.Backend.elementwise_, parameters, "clamp", limit)
        else:
            fastclip.clip_grad_value_(parameters, 0.25)
        for parameter, before in zip(parameters, plain, strict=True):
            assert parameter.grad is not None
            assert torch.equal(parameter.grad.cpu(), before.clamp(-0.25, 0.25))
    broken = values(dtypes)
    broken[2][0], broken[3][5], broken[3][7] = math.nan, math.inf, -math.inf
    counts = fastclip.find_nonfinite((str(i), p) for i, p in enumerate(make(broken)))
    assert counts == {"2": (1, 0), "3": (0, 2)}


class TestEmulated:
    pytestmark = needs_emulation

    @pytest.mark.parametrize("dtypes", [*((dtype,) for dtype in DTYPES), DTYPES], ids=str)
    def test_kernels_run_on_each_device(self, devices: Devices, dtypes: tuple[torch.dtype, ...]) -> None:
        """Two devices of different grids and the CPU, by the backends that auto chooses."""
        check_every_operation(lambda grads: on(devices, grads), dtypes)

    def test_two_launches_on_each_device_and_the_same_bits(self, devices: Devices) -> None:
        places = (0, 1, 1, 0, 1, 1, 0)
        results = []
        for _ in range(3):
            parameters = on(devices, values(), places)
            fastclip.get_total_norm(
                [p.grad for p in parameters if p.grad is not None]
            )  # the streams' tickets
            before = devices.library.num_launches
            norm = fastclip.clip_grad_norm_(parameters, MAX_NORM)
            assert devices.library.num_launches - before == 4
            results.append([norm, *(p.grad for p in parameters)])
        for result in results[1:]:
            torch.testing.assert_close(result, results[0], rtol=0, atol=0)

    def test_what_is_combined_is_not_rounded(self, devices: Devices) -> None:
        """Rounded to float32, the norm of the first device is 4096, and ones that decide the last bit go."""
        grads = [torch.tensor([4096.0, 1.0, 1.0]), torch.tensor([1.0])]
        parameters = on(devices, grads, (0, 1))
        norm = fastclip.get_total_norm([p.grad for p in parameters if p.grad is not None])
        assert norm.item() == torch.tensor(math.sqrt(4096.0**2 + 3)).item() > 4096

    def test_squares_that_leave_float64_are_combined(self, devices: Devices) -> None:
        grads = [torch.tensor([3e200, 0.0], dtype=torch.float64), torch.tensor([4e200], dtype=torch.float64)]
        parameters = on(devices, grads, (1, 0))
        assert fastclip.clip_grad_norm_(parameters, 1.0).item() == pytest.approx(5e200, rel=1e-15)
        assert parameters[1].grad is not None
        assert parameters[1].grad.item() == pytest.approx(0.8, rel=1e-15)

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_a_norm_that_is_not_finite_reaches_every_device(self, devices: Devices, bad: float) -> None:
        grads = [torch.ones(3), torch.tensor([1.0, bad])]
        parameters = on(devices, grads, (0, 1))
        with pytest.raises(RuntimeError, match=r"non-finite.*position 1, shape \(2,\)"):
            fastclip.clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True)
        assert grads[0].tolist() == [1.0] * 3
        fastclip.clip_grad_norm_(parameters, math.inf)
        assert grads[0].tolist() == [1.0] * 3
        fastclip.clip_grad_norm_(parameters, 1.0)
        assert grads[0].isnan().all() if math.isnan(bad) else grads[0].tolist() == [0.0] * 3

    def test_parameters_without_a_gradient_are_passed_over(self, devices: Devices) -> None:
        parameters = [torch.nn.Parameter(torch.zeros(1)), *on(devices, values((torch.float32,)))]
        parameters.insert(3, torch.nn.Parameter(torch.zeros(1)))
        norms = fastclip.grad_norms(parameters)
        assert torch.equal(norms, fastclip.grad_norms([p for p in parameters if p.grad is not None]))
        assert len(norms) == len(NUMELS)

    def test_a_demanded_backend_writes_nothing_if_it_declines_one(self, devices: Devices) -> None:
        """The first device's gradients are fit, the second's not."""
        strided = torch.full((8,), 5.0)[::2]
        for odd, places in ((strided, (0, 1)), (torch.full((8,), 5.0), (0, None))):
            parameters = on(devices, [torch.full((3,), 5.0), odd], places)
            for call in (
                lambda given=parameters: fastclip.clip_grad_norm_(given, 1.0),
                lambda given=parameters: fastclip.clip_grads_with_norm_(given, 1.0, torch.tensor(7.0)),
                lambda given=parameters: fastclip.clip_grad_value_(given, 1.0),
            ):
                with fastclip.use_backend("cuda"), pytest.raises(fastclip.BackendUnavailableError):
                    call()
            assert all(p.grad.unique().tolist() == [5.0] for p in parameters if p.grad is not None)

    def test_a_demanded_backend_takes_several_of_its_devices(self, devices: Devices) -> None:
        parameters = on(devices, [torch.tensor([3.0]), torch.tensor([4.0])], (1, 0))
        with fastclip.use_backend("cuda"):
            assert fastclip.clip_grad_norm_(parameters, 1.0).item() == 5.0
            fastclip.clip_grad_value_(parameters, 0.7)
        assert [p.grad.item() for p in parameters if p.grad is not None] == pytest.approx([0.6, 0.7])


class TestEager:
    """What no kernel takes on one device goes to torch there, and only there."""

    pytestmark = needs_emulation

    def test_strided_gradients_of_one_device(self) -> None:
        with cuda_library.emulated_devices() as devices:
            strided = torch.tensor([3.0, 0.0, 0.0])[::2]
            parameters = on(devices, [strided, torch.tensor([4.0])], (None, 1))
            before = devices.library.num_launches
            assert fastclip.clip_grad_norm_(parameters, 1.0).item() == 5.0
            assert devices.library.num_launches - before == 2
            assert strided.tolist() == pytest.approx([0.6, 0.0])

    def test_an_order_without_kernel_is_torchs(self) -> None:
        with cuda_library.emulated_devices() as devices:
            parameters = on(devices, [torch.tensor([3.0, 1.0]), torch.tensor([4.0])], (0, 1))
            before = devices.library.num_launches
            assert fastclip.clip_grad_norm_(parameters, 1.0, 0.0).item() == 2.0
            assert devices.library.num_launches == before


@needs_triton
@pytest.mark.usefixtures("interpreted")
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
def test_triton_runs_on_each_device(monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_eager(monkeypatch)
    numbers = dict(zip(NUMELS, (0, 1, 1, 0, 1, 1, 0), strict=True))
    monkeypatch.setattr(placing, "device_of", lambda t: torch.device("cuda", numbers[t.numel()]))
    read = triton._read

    def read_one_device(tensors: list[torch.Tensor], *, of_gradients: bool) -> object:
        """Decline as on GPUs; here all are on one CPU."""
        found = read(tensors, of_gradients=of_gradients)
        if len({numbers[t.numel()] for t in found.tensors}) > 1:
            return Declined("a gradient is on another device than the first")
        return found

    monkeypatch.setattr(triton, "_read", read_one_device)

    def make(grads: list[torch.Tensor]) -> list[torch.nn.Parameter]:
        parameters = [torch.nn.Parameter(torch.zeros_like(grad)) for grad in grads]
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad
        return parameters

    check_every_operation(make, (torch.float32, torch.bfloat16), (2.0,))


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("backend", ["cuda", "triton", "auto"])
def test_on_two_gpus(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    info = fastclip.backend_info().get(backend)
    if info is not None and not info.available:
        pytest.skip(f"needs the {backend} backend: {info.reason}")
    forbid_eager(monkeypatch)
    places = ["cuda:1" if place else "cuda:0" for place in PLACES]

    def make(grads: list[torch.Tensor]) -> list[torch.nn.Parameter]:
        parameters = [
            torch.nn.Parameter(torch.zeros_like(g, device=d)) for g, d in zip(grads, places, strict=True)
        ]
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad.to(parameter.device)
        return parameters

    with fastclip.use_backend(backend):
        check_every_operation(make, DTYPES)
