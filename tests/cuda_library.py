"""libfastclip_cuda without a GPU: csrc/cuda compiled for the CPU over `cuda_emulation`, driven by ctypes."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import compiled
import pytest
import torch
from torch.utils.dlpack import DLDeviceType

from fastclip import backends
from fastclip.backends import cpu, devices
from fastclip.backends import cuda as backend
from fastclip.strategies.within import Units

HERE = Path(__file__).parent
SOURCES = HERE.parent / "csrc" / "cuda"
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
ITEM_SIZES = {dtype: torch.empty(0, dtype=dtype).element_size() for dtype in DTYPES}
POISON = 0x5A
CAPTURE_MODES = ("global", "thread_local", "relaxed")


class Span(ctypes.Structure):
    """FastclipCudaSpan."""

    _fields_ = (("data", ctypes.c_void_p), ("numel", ctypes.c_int64), ("dtype", ctypes.c_uint8))


class Call(ctypes.Structure):
    """FastclipCudaCall."""

    _fields_ = (
        ("spans", ctypes.POINTER(Span)),
        ("num_spans", ctypes.c_int64),
        ("device", ctypes.c_int),
        ("stream", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
    )


class StepTarget(ctypes.Structure):
    """FastclipCudaStepTarget."""

    _fields_ = (
        ("param", ctypes.c_void_p),
        ("state", ctypes.c_void_p * 3),
        ("step", ctypes.c_void_p),
        ("rule", ctypes.c_uint32),
        ("state_dtype", ctypes.c_uint8),
        ("step_dtype", ctypes.c_uint8),
    )


class AdamRule(ctypes.Structure):
    """FastclipCudaAdamRule."""

    _fields_ = (
        ("lr_on_device", ctypes.c_void_p),
        *((name, ctypes.c_double) for name in ("lr", "beta1", "beta2", "eps", "weight_decay")),
        *((name, ctypes.c_uint8) for name in ("lr_dtype", "decoupled", "maximize")),
    )


class StepOptions(ctypes.Structure):
    """FastclipCudaStepOptions."""

    _fields_ = (
        ("norm_type", ctypes.c_double),
        ("max_norm", ctypes.c_double),
        ("max_norm_on_device", ctypes.c_void_p),
        ("given_coefs", ctypes.c_void_p),
        ("given_per_span", ctypes.c_uint8),
        ("max_value", ctypes.c_double),
        ("grad_scale", ctypes.c_void_p),
        ("found_inf", ctypes.c_void_p),
        ("skip_nonfinite", ctypes.c_uint8),
        ("write_grads", ctypes.c_uint8),
        ("norm_dtype", ctypes.c_uint8),
        ("total_norm", ctypes.c_void_p),
        ("clip_coef", ctypes.c_void_p),
        ("skipped", ctypes.c_void_p),
        ("counts", ctypes.c_void_p),
    )


def byref(call: Call) -> object:
    return ctypes.byref(call)


def double(value: float) -> ctypes.c_double:
    return ctypes.c_double(value)


def threshold(max_norm: float | torch.Tensor) -> tuple[ctypes.c_double, ctypes.c_void_p]:
    """Return max_norm and max_norm_on_device, of which a float64 tensor gives the latter."""
    if isinstance(max_norm, torch.Tensor):
        return ctypes.c_double(float("inf")), pointer(max_norm)
    return ctypes.c_double(max_norm), ctypes.c_void_p(None)


def pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


class CudaError(Exception):
    """A status other than 0, as its message."""


@functools.cache
def compiler() -> str | None:
    """Return the C++ compiler, or None if there is none that knows `_Float16`."""
    found = shutil.which("g++")
    if found is None:
        return None
    probe = subprocess.run(
        [found, "-x", "c++", "-fsyntax-only", "-"], input="_Float16 x;", text=True, capture_output=True
    )
    return found if probe.returncode == 0 else None


@functools.cache
def built() -> Library:
    """Return the library, compiled for the CPU once for all processes, and loaded."""
    emulation = HERE / "cuda_emulation"
    folders = ((SOURCES, "*.cu"), (SOURCES, "*.cpp"), (emulation, "*.cpp"))
    translated = [source for folder, pattern in folders for source in sorted(folder.glob(pattern))]
    flags = ["-std=c++17", "-O2", "-fPIC", "-shared", "-ffp-contract=off", "-Wno-unknown-pragmas"]
    # Its runtime is the emulated one, also where a torch built with CUDA has loaded NVIDIA's.
    flags.append("-Wl,-Bsymbolic")
    warnings = ["-Wall", "-Wextra", "-Werror"]
    command = [compiler() or "g++", *warnings, *flags, f"-I{emulation}", "-x", "c++", *map(str, translated)]
    name = "libfastclip_cuda_emulated.so"

    def build(folder: Path) -> None:
        done = subprocess.run([*command, "-o", str(folder / name)], text=True, capture_output=True)
        assert done.returncode == 0, done.stderr

    version = subprocess.check_output([command[0], "--version"], text=True)
    read = [*compiled.sources(SOURCES.parent), *compiled.sources(emulation)]
    return Library(compiled.kept("cuda_emulation", read, [version, *command], build) / name)


def on_a_new_stream() -> Iterator[Library]:
    """A fixture: the library on a stream that no other test has used, for which nothing is cached."""
    library = built()
    library.device, library.stream = 0, library.stream + 1
    yield library
    library.end_capture()  # which a test that fails may leave behind
    library.c.emulation_set_allocations_until_failure(-1)
    library.c.emulation_set_driver(True)


def run_on_the_cpu(patch: pytest.MonkeyPatch) -> Library:
    """Let fastclip's CUDA backend take tensors on the CPU, its scratch poisoned; return the library."""
    library = built()
    assert backend._C.load_cuda_library(str(library.path)) == ""
    patch.setattr(backend, "unavailable_reason", lambda: None)
    patch.setattr(backend, "DLPACK_TYPE", DLDeviceType.kDLCPU)
    patch.setattr(backend, "_device", lambda found: torch.device("cpu"))
    patch.setattr(
        backend, "_workspace", lambda found: torch.full((found.workspace_bytes,), POISON, dtype=torch.uint8)
    )
    # Which, for a parameter on the CPU, takes it to be for the CPU's kernels.
    patch.setattr(Units, "folds", lambda units, params: False)
    return library


def take_steps_of_the_cpu(patch: pytest.MonkeyPatch) -> Library:
    """Let fastclip's route for CUDA parameters, and no other, take those on the CPU; return the library."""
    patch.setattr(backends, "_usable", lambda: (backend,))
    return run_on_the_cpu(patch)


class Devices:
    """The emulated devices, on which CPU tensors may be placed; all from Python to the kernels runs."""

    def __init__(self, library: Library, patch: pytest.MonkeyPatch) -> None:
        """Let `fastclip._C` and the backends see placed tensors there while the patch is in force."""
        self.library = library
        self._devices: dict[int, torch.device] = {}
        emulate = library.c.emulation_exchange_api
        emulate.restype, emulate.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
        new, pointer_of = ctypes.pythonapi.PyCapsule_New, ctypes.pythonapi.PyCapsule_GetPointer
        new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        pointer_of.restype, pointer_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        name = b"dlpack_exchange_api"
        real = pointer_of(torch.Tensor.__dlpack_c_exchange_api__, name)
        patch.setattr(torch.Tensor, "__dlpack_c_exchange_api__", new(emulate(real), name, None))
        assert backend._C.load_cuda_library(str(library.path)) == ""
        patch.setattr(backend, "unavailable_reason", lambda: None)
        patch.setattr(backend, "_device", lambda found: torch.device("cpu"))
        patch.setattr(backends, "_usable", lambda: (cpu, backend))
        patch.setattr(devices, "device_of", lambda t: self._devices.get(t.data_ptr(), t.device))

    def place(self, tensor: torch.Tensor, device: int | None) -> torch.Tensor:
        """Put a tensor that is not empty on a device; None leaves it on the CPU."""
        if device is not None:
            self._devices[tensor.data_ptr()] = torch.device("cuda", device)
            self.library.c.emulation_place(pointer(tensor), device)
        return tensor


@contextlib.contextmanager
def emulated_devices() -> Iterator[Devices]:
    """Hand out the emulated devices; afterwards torch's tensors are again where they are."""

    def read_by_torch() -> None:
        increment = torch.autograd.graph.increment_version
        assert backend._C.set_torch(torch.Tensor, torch.nn.Parameter, increment) == ""

    with pytest.MonkeyPatch.context() as patch:
        emulated = Devices(built(), patch)
        read_by_torch()
        yield emulated
    read_by_torch()


class Library:
    """The C interface on CPU tensors; every call may choose its device and stream."""

    def __init__(self, path: Path, stream: int = 1) -> None:
        self.path = path
        self.c = ctypes.CDLL(str(path))
        self.c.fastclip_cuda_message.restype = ctypes.c_char_p
        self.device = 0
        self.stream = stream

    def spans(self, tensors: Sequence[torch.Tensor]) -> ctypes.Array[Span]:
        listed = [Span(t.data_ptr(), t.numel(), DTYPES[t.dtype]) for t in tensors]
        return (Span * len(listed))(*listed)

    def call(self, tensors: Sequence[torch.Tensor]) -> Call:
        nbytes = ctypes.c_int64()
        self.check(
            self.c.fastclip_cuda_workspace_bytes(
                self.device, ctypes.c_int64(len(tensors)), ctypes.byref(nbytes)
            )
        )
        # One byte more than asked for, which must survive.
        self.workspace = torch.full((nbytes.value + 1,), POISON, dtype=torch.uint8)
        return Call(self.spans(tensors), len(tensors), self.device, self.stream, self.workspace.data_ptr())

    def step_call(self, tensors: Sequence[torch.Tensor]) -> Call:
        """As `call`, with the workspace of a step."""
        nbytes = ctypes.c_int64()
        num_spans = ctypes.c_int64(len(tensors))
        self.check(self.c.fastclip_cuda_step_workspace_bytes(self.device, num_spans, ctypes.byref(nbytes)))
        self.workspace = torch.full((nbytes.value + 1,), POISON, dtype=torch.uint8)
        return Call(self.spans(tensors), len(tensors), self.device, self.stream, self.workspace.data_ptr())

    def adam_step(
        self,
        grads: Sequence[torch.Tensor],
        targets: Sequence[StepTarget],
        rules: Sequence[AdamRule],
        options: StepOptions,
    ) -> None:
        self.finish(
            self.c.fastclip_cuda_adam_step(
                ctypes.byref(self.step_call(grads)),
                (StepTarget * len(targets))(*targets),
                (AdamRule * len(rules))(*rules),
                ctypes.c_int64(len(rules)),
                ctypes.byref(options),
            )
        )

    def check(self, status: int) -> None:
        if status != 0:
            raise CudaError(self.c.fastclip_cuda_message(status).decode())

    def finish(self, status: int) -> None:
        self.check(status)
        assert self.workspace[-1] == POISON, "a kernel wrote behind its workspace"

    def total_norm(
        self, tensors: Sequence[torch.Tensor], norm_type: float = 2.0, max_norm: float | torch.Tensor = 1.0
    ) -> tuple[torch.Tensor, float]:
        norm = _poisoned(tensors, ())
        coefficient = ctypes.c_double(float("nan"))
        self.finish(
            self.c.fastclip_cuda_total_norm(
                ctypes.byref(self.call(tensors)),
                ctypes.c_double(norm_type),
                *threshold(max_norm),
                DTYPES[norm.dtype],
                pointer(norm),
                ctypes.byref(coefficient),
            )
        )
        return norm, coefficient.value

    def clip_grad_norm(
        self, tensors: Sequence[torch.Tensor], max_norm: float | torch.Tensor, norm_type: float = 2.0
    ) -> torch.Tensor:
        norm = _poisoned(tensors, ())
        self.finish(
            self.c.fastclip_cuda_clip_grad_norm(
                ctypes.byref(self.call(tensors)),
                ctypes.c_double(norm_type),
                *threshold(max_norm),
                DTYPES[norm.dtype],
                pointer(norm),
            )
        )
        return norm

    def scale(self, tensors: Sequence[torch.Tensor], coefficient: float | torch.Tensor) -> None:
        """Multiply by one coefficient, or each tensor by its own: float64, 1-dim."""
        per_span = isinstance(coefficient, torch.Tensor)
        values = torch.as_tensor(coefficient, dtype=torch.float64)
        call = ctypes.byref(self.call(tensors))
        self.finish(self.c.fastclip_cuda_scale(call, pointer(values), ctypes.c_int(per_span)))

    def clip_grads_with_norm(
        self, tensors: Sequence[torch.Tensor], max_norm: float | torch.Tensor, norm: torch.Tensor
    ) -> None:
        self.finish(
            self.c.fastclip_cuda_clip_grads_with_norm(
                ctypes.byref(self.call(tensors)),
                *threshold(max_norm),
                DTYPES[norm.dtype],
                pointer(norm),
            )
        )

    def norms(self, tensors: Sequence[torch.Tensor], norm_type: float = 2.0) -> torch.Tensor:
        norms = _poisoned(tensors, (len(tensors),))
        self.finish(
            self.c.fastclip_cuda_norms(
                ctypes.byref(self.call(tensors)),
                ctypes.c_double(norm_type),
                DTYPES[norms.dtype],
                pointer(norms),
            )
        )
        return norms

    def count_nonfinite(self, tensors: Sequence[torch.Tensor]) -> list[tuple[int, int]]:
        counts = torch.full((len(tensors), 2), -1, dtype=torch.int64)
        self.finish(self.c.fastclip_cuda_count_nonfinite(ctypes.byref(self.call(tensors)), pointer(counts)))
        return [(nan, inf) for nan, inf in counts.tolist()]

    def clamp(self, tensors: Sequence[torch.Tensor], limit: float) -> None:
        self.finish(
            self.c.fastclip_cuda_elementwise(
                ctypes.byref(self.call(tensors)), b"clamp", ctypes.c_double(limit), None
            )
        )

    @property
    def num_launches(self) -> int:
        return int(self.c.emulation_num_launches())

    @property
    def num_allocations(self) -> int:
        return int(self.c.emulation_num_allocations())

    def begin_capture(self, mode: str = "global") -> None:
        self.c.emulation_begin_capture(ctypes.c_void_p(self.stream), CAPTURE_MODES.index(mode))

    def end_capture(self) -> int:
        """Return the number of kernels captured; -1 if the capture was invalidated."""
        return int(self.c.emulation_end_capture())

    def replay(self) -> None:
        self.c.emulation_replay()


def _poisoned(tensors: Sequence[torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
    wide = any(t.dtype == torch.float64 for t in tensors)
    return torch.full(shape, -1.0, dtype=torch.float64 if wide else torch.float32)
