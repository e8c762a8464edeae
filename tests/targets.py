"""What the contract is tested on: every backend, on the devices of this machine, emulated and interpreted."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import cuda_library
import pytest
import tolerance
import torch
import triton_interpreter
from cases import BY_NAME, CASES, DTYPES, NORM_TYPES, Case, dtype_id
from torch import Tensor

import fastclip
from fastclip import backends
from fastclip.backends import cpu

COVERING_NORM_TYPES = {
    torch.float32: (2.0, math.inf, 1.0),
    torch.float64: (2.0, 3.0),
    torch.bfloat16: (2.0,),
    torch.float16: (2.0,),
}
"""The norm that matters most of every type, and each kind of norm of a type whose sums are hard."""

TOO_LONG_TO_INTERPRET = {
    *("around_one_chunk", "many_chunks", "1200_tiny", "nan_in_many_chunks"),
    *("duplicates_in_many_chunks", "overlapping_in_many_chunks"),
}


@dataclass(frozen=True)
class Target:
    """One way to run fastclip's functions.

    Attributes:
        name: The part of the test's id.
        backend: The one that runs; what it cannot take raises.
        device: Where its tensors are.
        instruction_set: Of the CPU's kernels.
        patches: Lets the backend take tensors on the CPU in the place of its device's.
        is_quick: Whether a call takes well below a millisecond: all that a rule is about is run through,
            where else a selection is.
        cases: Those of a size for it.
        num_steps: That an optimizer takes beside the oracle.
        vector_bytes, tile_bytes, chunk_bytes: What its kernels cut memory into.
        missing: Why it cannot run here, or None.
    """

    name: str
    backend: str
    device: str = "cpu"
    instruction_set: str | None = None
    patches: Callable[[pytest.MonkeyPatch], object] | None = None
    is_quick: bool = True
    cases: tuple[Case, ...] = CASES
    num_steps: int = 20
    vector_bytes: int = 16
    tile_bytes: int = 1024
    chunk_bytes: int = 64 * 1024
    missing: str | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def is_native(self) -> bool:
        """Whether kernels run, which decline what is not dense and handle powers of any size."""
        return self.backend != "eager"

    @property
    def is_real(self) -> bool:
        """Whether it needs a GPU."""
        return self.device == "cuda"

    @property
    def is_interpreted(self) -> bool:
        """Whether a launch takes a second."""
        return self.backend == "triton" and not self.is_real

    @property
    def knows_what_it_wrote(self) -> bool:
        """Whether autograd is told of those gradients alone that changed: a device decides by itself."""
        return self.backend == "cpu"

    @property
    def scales_in_turn(self) -> bool:
        """Whether gradients that share memory are scaled as often as they are given, and not declined."""
        return self.backend != "triton"

    @property
    def takes_wide_state(self) -> bool:
        """Whether a step takes float32 state of 16-bit parameters."""
        return self.backend == "cuda"

    @property
    def takes_shared_counters(self) -> bool:
        """Whether a step counts in turn where parameters share their counter."""
        return self.backend == "cpu"

    @property
    def reads_rates_itself(self) -> bool:
        """Whether the kernels read a learning rate that is a tensor, which must be one that they know."""
        return self.backend != "cpu"

    @property
    def contracts(self) -> bool:
        """Whether the compiler makes one rounding of product and sum, so that bits are its own."""
        return self.is_real

    def norm_types(self, dtype: torch.dtype) -> tuple[float, ...]:
        """Return the orders of norms to measure in a type."""
        return NORM_TYPES if self.is_quick else COVERING_NORM_TYPES[dtype]

    def some(self, *names: str) -> list[Case]:
        """Return all cases; where calls take long, those of these names."""
        return [case for case in self.cases if self.is_quick or case.name in names]

    def named(self, *names: str) -> list[Case]:
        """Return those of the named cases that are of a size for it."""
        return [BY_NAME[name] for name in names if BY_NAME[name] in self.cases]

    def bound(self, tensors: Iterable[Tensor], norm_type: float) -> float:
        """Return the relative bound for the norm of all tensors together."""
        listed = list(tensors)
        numel = sum(t.numel() for t in listed)
        kind = "cuda" if self.backend in ("cuda", "triton") else "cpu"
        return max((tolerance.norm(t.dtype, numel, norm_type, kind) for t in listed), default=0.0)

    def accepted_error(self, norm_type: float) -> float:
        """Return what is promised; the error of a sum counts twice where no root halves it."""
        halved = norm_type == 2.0 or self.backend == "cpu"
        return tolerance.ACCEPTED_NORM_ERROR * (1 if halved else 2)

    def lengths(self, dtype: torch.dtype) -> list[int]:
        """Return numbers of elements around the vector, the tile and the chunk, and none."""
        vector, tile, chunk = (
            n // dtype.itemsize for n in (self.vector_bytes, self.tile_bytes, self.chunk_bytes)
        )
        if self.is_interpreted:
            return [0, 1, vector - 1, vector, tile + 1, 2 * chunk + 1]
        around = (n + extra for n in (vector, tile, chunk) for extra in (-1, 0, 1))
        return sorted({0, 1, *around, 2 * chunk + 1})

    def starts(self, dtype: torch.dtype) -> range:
        """Return every offset from an aligned address to the next."""
        return range(self.vector_bytes // dtype.itemsize + 1)

    def parameters(self, parameters: Iterable[Tensor]) -> list[torch.nn.Parameter]:
        """Return copies of the parameters on its device."""
        return [torch.nn.Parameter(p.detach().to(self.device, copy=True)) for p in parameters]

    @contextlib.contextmanager
    def in_force(self) -> Iterator[Target]:
        """Run fastclip's functions on this target, and on nothing else, inside the `with` block."""
        if self.missing:
            pytest.skip(self.missing)
        backends._usable()  # which is kept for good: not to be asked for the first time under patches
        before = cpu._C.instruction_set() if self.instruction_set else None
        if self.instruction_set:
            assert cpu._C.select_instruction_set(self.instruction_set)
        try:
            with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
                # By numpy, which stands in for Triton's device: kernels overflow and divide on purpose.
                warnings.filterwarnings("ignore", ".* encountered in .*", RuntimeWarning)
                if self.patches:
                    self.patches(patch)
                with fastclip.use_backend(self.backend):
                    yield self
        finally:
            if before:
                cpu._C.select_instruction_set(before)


def _needs(backend: str) -> str | None:
    info = fastclip.backend_info()[backend]
    return None if info.available else f"needs the {backend} backend: {info.reason}"


def _no_emulation() -> str | None:
    if torch.cuda.is_available():
        return "the library is loaded for this machine's GPU; hide it (CUDA_VISIBLE_DEVICES=) to emulate one"
    if cpu._C is None or cuda_library.compiler() is None:
        return "needs the C++ extension and g++ with _Float16"
    return None


CPU_TARGETS = [
    Target(f"cpu_{name}" if name else "cpu", "cpu", instruction_set=name, missing=_needs("cpu"))
    for name in (cpu._C.supported_instruction_sets() if cpu._C else [None])
]
EAGER = Target("eager", "eager")
GPU_TARGETS = [
    Target(
        "cuda_emulated",
        "cuda",
        patches=cuda_library.run_on_the_cpu,
        is_quick=False,
        num_steps=8,
        tile_bytes=4096,
        chunk_bytes=16 * 1024,
        missing=_no_emulation(),
    ),
    Target(
        "triton_interpreted",
        "triton",
        patches=triton_interpreter.interpret,
        is_quick=False,
        num_steps=2,
        cases=tuple(case for case in CASES if case.name not in TOO_LONG_TO_INTERPRET),
        tile_bytes=512,
        chunk_bytes=1024,
        missing=triton_interpreter.missing(),
    ),
    Target("cuda", "cuda", "cuda", tile_bytes=4096, chunk_bytes=16 * 1024, missing=_needs("cuda")),
    Target("triton", "triton", "cuda", missing=_needs("triton")),
]
TARGETS = [*CPU_TARGETS, EAGER, *GPU_TARGETS]
REAL = [target for target in GPU_TARGETS if target.is_real]
NATIVE = [target for target in TARGETS if target.is_native]
STEPPING = [CPU_TARGETS[-1], *GPU_TARGETS]
"""Those whose kernels step; other instruction sets of the CPU give the same bits."""


def marks_of(target: Target) -> list[pytest.MarkDecorator]:
    return [pytest.mark.cuda] if target.is_real else []


def _part_of_id(value: Any) -> str:
    if isinstance(value, torch.dtype):
        return dtype_id(value)
    return getattr(value, "name", f"{value:g}" if isinstance(value, float) else str(value))


def on(
    names: str = "",
    sizes: Callable[[Target], Iterable[tuple[Any, ...]]] = lambda target: [()],
    targets: Iterable[Target] = TARGETS,
) -> pytest.MarkDecorator:
    """Parametrize a test over the targets that can run here, and each by the sizes it has for the names.

    Which targets cannot, and why, test_targets.py says once.
    """
    params = [
        pytest.param(
            target, *values, id="-".join(map(_part_of_id, (target, *values))), marks=marks_of(target)
        )
        for target in targets
        if target.missing is None
        for values in sizes(target)
    ]
    return pytest.mark.parametrize(("target", *names.split()), params, indirect=["target"])


def cases_and_dtypes(
    cases: Callable[[Target], Iterable[Case]],
) -> Callable[[Target], Iterable[tuple[Case, torch.dtype]]]:
    """Return the sizes of a test of cases in every type; where calls take long, in float32 and one other."""

    def sizes(target: Target) -> Iterator[tuple[Case, torch.dtype]]:
        for number, case in enumerate(cases(target)):
            for dtype in DTYPES if target.is_quick else (DTYPES[0], DTYPES[1 + number % 3]):
                if dtype in case.dtypes:
                    yield case, dtype

    return sizes


def dtypes(target: Target) -> Iterable[tuple[torch.dtype]]:
    """Return the sizes of a test in every type."""
    return ((dtype,) for dtype in DTYPES)
