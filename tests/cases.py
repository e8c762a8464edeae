"""The gradients that every backend is tested with.

A case is a function of device, dtype and seed: it gives the same values, layouts and aliases on every call,
so a test builds it once for fastclip, once for the oracle and once for torch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastclip import reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

CHUNK_BYTES = 64 * 1024
"""The smallest unit of work of the CPU backend; see csrc/chunks.h."""

VECTOR_LENGTHS = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 129, 255, 256, 257, 511, 513)
"""Around the block of 32 elements, and the run of 8 blocks in which 16-bit types are added up."""


class Source:
    """Makes the tensors of one case."""

    def __init__(self, device: torch.device | str, dtype: torch.dtype, seed: int) -> None:
        self.device, self.dtype = torch.device(device), dtype
        self.info = torch.finfo(dtype)
        self.chunk_numel = CHUNK_BYTES // dtype.itemsize
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        # Drawn on the CPU, so that every device gets the same values.
        values = torch.randn(shape, generator=self._generator, dtype=torch.float64)
        return values.to(self.device, dtype or self.dtype)

    def full(self, value: float, *shape: int) -> Tensor:
        return torch.full(shape, value, dtype=self.dtype, device=self.device)

    def with_value(self, value: float, *shape: int) -> Tensor:
        """Normal values with `value` at one place, neither at the start nor at the end."""
        tensor = self.normal(*shape)
        tensor.view(-1)[tensor.numel() // 3] = value
        return tensor


Gradients = list[Tensor | None]


@dataclass(frozen=True)
class Case:
    """Gradients with a name.

    Attributes:
        name: The part of the test's id.
        build: Makes the gradients.
        dtypes: Those for which the case means something.
        dense: Whether every tensor fills its memory, so that kernels take it.
        aliased: Whether tensors share memory.
        has_empty: Whether a tensor has no elements, so that there is no inf-norm.
    """

    name: str
    build: Callable[[Source], Gradients]
    dtypes: tuple[torch.dtype, ...] = DTYPES
    dense: bool = True
    aliased: bool = False
    has_empty: bool = False

    def gradients(self, device: torch.device | str, dtype: torch.dtype, seed: int = 0) -> Gradients:
        return self.build(Source(device, dtype, seed))

    def tensors(self, device: torch.device | str, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
        return present(self.gradients(device, dtype, seed))

    @functools.cache  # noqa: B019 - cases live as long as the process
    def oracle_norm(self, dtype: torch.dtype, norm_type: float) -> float:
        return reference.total_norm(self.tensors("cpu", dtype), norm_type)

    def parameters(
        self, device: torch.device | str, dtype: torch.dtype, seed: int = 0
    ) -> list[torch.nn.Parameter]:
        return parameters_of(self.gradients(device, dtype, seed))


def present(gradients: Iterable[Tensor | None]) -> list[Tensor]:
    return [g for g in gradients if g is not None]


def parameters_of(gradients: Iterable[Tensor | None]) -> list[torch.nn.Parameter]:
    """Parameters with these gradients; their own values take no memory."""
    parameters = []
    for grad in gradients:
        values = torch.zeros(()) if grad is None else grad.new_zeros(()).expand(grad.shape)
        parameter = torch.nn.Parameter(values)
        parameter.grad = grad
        parameters.append(parameter)
    return parameters


def _overlapping(s: Source, numel: int) -> Gradients:
    base = s.normal(numel)
    return [base[: numel * 2 // 3], base[numel // 3 :]]


def _duplicates(s: Source, numel: int) -> Gradients:
    grad = s.normal(numel)
    return [grad, s.normal(5), grad]


def _pieces(s: Source, numels: list[int]) -> Gradients:
    """Tensors of their own, drawn at once: to draw each takes longer than to copy it."""
    return [piece.clone() for piece in s.normal(sum(numels)).split(numels)]


# Squares (and for float16 also sums) leave the range of the dtype, of float32, or of float64.
_LARGE = {torch.float32: 1e30, torch.bfloat16: 1e30, torch.float16: 6e4, torch.float64: 1e200}
_SMALL = {torch.float32: 1e-30, torch.bfloat16: 1e-30, torch.float16: 1e-7, torch.float64: 1e-200}
_FOUR_TIMES = {torch.float32: 6e31, torch.bfloat16: 6e31, torch.float16: 6e4, torch.float64: 4e307}

CASES = (
    Case("nothing", lambda s: []),
    Case("all_none", lambda s: [None, None]),
    Case("some_none", lambda s: [None, s.normal(40, 3), None, s.normal(7)]),
    Case("scalar", lambda s: [s.normal()]),
    Case("scalars", lambda s: [s.normal() for _ in range(9)]),
    Case("only_empty", lambda s: [s.normal(0)], has_empty=True),
    Case("some_empty", lambda s: [s.normal(0), s.normal(3), s.normal(2, 0, 5), s.normal(33)], has_empty=True),
    Case("shapes", lambda s: [s.normal(64, 48), s.normal(64), s.normal(8, 3, 5, 5), s.normal(1, 1, 1)]),
    Case("zeros", lambda s: [s.full(0.0, 300), s.full(-0.0, 5)]),
    Case("ones", lambda s: [s.full(1.0, 1000), s.full(-1.0, 24)]),
    Case("offset", lambda s: [s.normal(100)[9:], s.normal(20, 30)[3:17], s.normal(9)[4]]),
    Case("misaligned", lambda s: [s.normal(600 + start)[start:] for start in (1, 3, 5, 7, 13)]),
    Case("transposed", lambda s: [s.normal(37, 65).t(), s.normal(4, 5, 6).permute(2, 0, 1)]),
    Case("channels_last", lambda s: [s.normal(4, 6, 5, 7).to(memory_format=torch.channels_last)]),
    Case("every_second", lambda s: [s.normal(300)[::2], s.normal(8)], dense=False),
    Case("columns", lambda s: [s.normal(40, 50)[:, 3:20], s.normal(6, 7, 8)[:, 2]], dense=False),
    Case("vector_lengths", lambda s: [s.normal(n) for n in VECTOR_LENGTHS]),
    Case("around_one_chunk", lambda s: [s.normal(s.chunk_numel + extra) for extra in (-1, 0, 1)]),
    Case("many_chunks", lambda s: [s.normal(4 * s.chunk_numel + 37), s.normal(2 * s.chunk_numel - 1)]),
    Case("1200_tiny", lambda s: _pieces(s, [i % 17 + 1 for i in range(1200)])),
    Case("mixed_dtypes", lambda s: [s.normal(77, dtype=d) for d in (s.dtype, *DTYPES)]),
    Case("large", lambda s: [s.full(_LARGE[s.dtype], 1000), s.normal(3)]),
    Case("small", lambda s: [s.full(_SMALL[s.dtype], 1000), s.full(-_SMALL[s.dtype], 70)]),
    Case("four_times_large", lambda s: [s.full(_FOUR_TIMES[s.dtype], 4)]),
    Case("large_and_small", lambda s: [s.full(_LARGE[s.dtype], 300), s.full(_SMALL[s.dtype], 300)]),
    Case("subnormal", lambda s: [s.full(s.info.smallest_normal * s.info.eps, 40) * 3]),
    Case(
        "subnormal_among_normal",
        lambda s: [s.with_value(s.info.smallest_normal / 4, 50), s.full(s.info.smallest_normal, 9)],
    ),
    Case("largest", lambda s: [s.full(s.info.max, 3)]),
    Case("inf", lambda s: [s.normal(50), s.with_value(torch.inf, 700)]),
    Case("minus_inf", lambda s: [s.with_value(-torch.inf, 50)]),
    Case("nan", lambda s: [s.normal(50), s.with_value(torch.nan, 700), s.normal(3)]),
    Case("inf_then_nan", lambda s: [s.with_value(torch.inf, 90), s.with_value(torch.nan, 90)]),
    Case("nan_in_many_chunks", lambda s: [s.with_value(torch.nan, 5 * s.chunk_numel)]),
    Case("duplicates", lambda s: _duplicates(s, 100), aliased=True),
    Case("duplicates_in_many_chunks", lambda s: _duplicates(s, 4 * s.chunk_numel + 5), aliased=True),
    Case("overlapping", lambda s: _overlapping(s, 90), aliased=True),
    Case("overlapping_in_many_chunks", lambda s: _overlapping(s, 6 * s.chunk_numel + 7), aliased=True),
)

BY_NAME = {case.name: case for case in CASES}

NORM_TYPES = (1.0, 2.0, torch.inf, 0.5, 3.0, 2.5, 10.0, 100.0)


def dtype_id(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def select(*, aliased: bool | None = None, dense: bool | None = None) -> list[Case]:
    """The cases with these properties; None does not ask."""
    return [c for c in CASES if aliased in (None, c.aliased) and dense in (None, c.dense)]
