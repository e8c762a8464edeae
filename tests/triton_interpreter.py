"""Triton's kernels on CPU tensors, one operation of numpy per operation of the kernel.

Triton decides whether to interpret when it and the kernels are imported, so a test module imports this one
first. The variable is unset again: for every other test, this machine is one without Triton's devices.
Where there is one, the kernels are compiled for it in this process and not interpreted.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import inspect
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import fastclip
from fastclip.backends import cpu

VARIABLE = "TRITON_INTERPRET"


def missing() -> str | None:
    """Return why nothing can be interpreted here, or None."""
    if importlib.util.find_spec("triton") is None or cpu._C is None:
        return "needs triton (pip install 'fastclip[gpu]') and the C++ extension"
    if torch.cuda.is_available():
        return "the kernels are compiled for this machine's GPU; hide it (CUDA_VISIBLE_DEVICES=) to interpret"
    return None


needs_triton = pytest.mark.skipif(missing() is not None, reason=missing() or "")

if missing() is None:
    os.environ[VARIABLE] = "1"
    try:
        for name in ("norm", "scale", "elementwise", "nonfinite", "step", "thresholds", "units"):
            importlib.import_module(f"fastclip.kernels.{name}")
    finally:
        del os.environ[VARIABLE]


def _convert_bfloat16(values: np.ndarray, source: Any, target: Any, _rounding: Any) -> np.ndarray:
    """Convert between float32 and the bits of bfloat16 as devices do.

    The interpreter's own conversion truncates, and goes wrong for subnormal numbers.
    """
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    if source.name == "bf16":
        assert target.name == "fp32"
        return tensor.view(torch.bfloat16).to(torch.float32).numpy()
    assert (source.name, target.name) == ("fp32", "bf16")
    return tensor.to(torch.bfloat16).view(torch.uint16).numpy()


def _remembering(dtype_of: Any) -> Any:
    """Return the interpreter's function that gives the dtype of numpy, which makes a table at every call."""
    once = functools.cache(dtype_of)
    return lambda of: np.dtype(np.uint64) if of.scalar.is_ptr() else once(of.scalar)


@functools.cache
def _names_of_builtins(package: object) -> list[str]:
    from triton.language.core import is_builtin

    return [name for name, member in inspect.getmembers(package) if is_builtin(member)]


def _patch_builtin(package: Any, builder: Any, scope: Any) -> None:
    """Patch as the interpreter's own does, which looks through all of a package at every call in a kernel.

    Of the time of a test, that is a third.
    """
    from triton.language.core import is_builtin
    from triton.runtime.interpreter import _patch_attr

    for name in _names_of_builtins(package):
        if is_builtin(member := getattr(package, name)):
            _patch_attr(package, name, member, builder, scope)


@functools.cache
def _languages(fn: Any) -> frozenset[str]:
    """Return which of the interpreter's two packages a function sees."""
    import triton.language as tl

    return frozenset(
        m.__name__ for m in fn.__globals__.values() if inspect.ismodule(m) and m in (tl, tl.core)
    )


def _patching_once(patch_lang: Any) -> Any:
    """Return what patches the language for a launch as `patch_lang` does, but not again for every call in it.

    Of the time of a test, that is a fifth.
    """
    in_force: set[str] = set()

    def patch(fn: Any) -> Any:
        if in_force and _languages(fn) <= in_force:
            return None  # inside a launch nobody takes it back
        is_launch = not in_force
        scope = patch_lang(fn)
        in_force.update(_languages(fn))
        if is_launch:
            restore = scope.restore

            def restore_all() -> None:
                in_force.clear()
                restore()

            scope.restore = restore_all
        return scope

    return patch


def _poisoned(num_rows: int, num_columns: int, device: torch.device) -> torch.Tensor:
    return torch.full((num_rows, num_columns), float("nan"), dtype=torch.float64, device=device)


def noted_launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that gets the names of the kernels that are launched from here on."""
    from triton.runtime.interpreter import GridExecutor

    names: list[str] = []
    launch = GridExecutor.__call__

    def noting(self: Any, *args: Any, **kwargs: Any) -> Any:
        names.append(self.fn.__name__)
        return launch(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", noting)
    return names


def interpret(patch: pytest.MonkeyPatch) -> None:
    """Let the Triton backend take CPU tensors, which it cuts into small chunks, its scratch poisoned."""
    from triton.runtime import interpreter

    from fastclip.backends import triton as backend
    from fastclip.kernels import step_table, table

    patch.setenv(VARIABLE, "1")
    patch.setattr(interpreter, "_convert_float", _convert_bfloat16)
    patch.setattr(interpreter, "_get_np_dtype", _remembering(interpreter._get_np_dtype))
    # Whether integers overflow is computed for an assertion that only Triton's debug mode makes.
    options = dataclasses.replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    patch.setattr(interpreter.interpreter_builder, "options", options)
    patch.setattr(interpreter, "_patch_builtin", _patch_builtin)
    patch.setattr(interpreter, "_patch_lang", _patching_once(interpreter._patch_lang))
    # Two tiles of the interpreter, so that short tensors have several chunks and programs several rounds.
    patch.setattr(table, "MIN_CHUNK_NBYTES", 1024)
    for module in (table, step_table):
        patch.setattr(module, "scratch", _poisoned)
    # Tables of other tests may have larger chunks.
    patch.setattr(backend, "_tables", table.TableCache(table.build_table))
    patch.setattr(backend, "_step_tables", table.TableCache(step_table.build_step_table))


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The Triton backend, in force, interpreted."""
    interpret(monkeypatch)
    with fastclip.use_backend("triton"):
        yield
