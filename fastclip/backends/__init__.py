"""Backends by name, and the choice between them.

A backend is a module with the functions of `base.Backend`, by which `run` is told what to do. `auto` asks
each usable one in order of preference; a backend that cannot take the tensors at hand answers with
`Declined`, having touched nothing, and the next is asked. `eager`, torch's own operations, is last and takes
everything. An exception inside a backend is never a reason to try another.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar, Token
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

from torch import Tensor
from torch._C import _get_tracing_state, _len_torch_dispatch_stack
from torch.compiler import is_compiling

from fastclip.backends import eager
from fastclip.backends.base import Backend, BackendInfo, Declined
from fastclip.backends.devices import WRITING, spread
from fastclip.errors import BackendUnavailableError

__all__ = ["NAMES", "Backend", "BackendInfo", "Declined", "backend_info", "run", "run_foreach", "use_backend"]

Asked = ParamSpec("Asked")
Result = TypeVar("Result")

NAMES = ("cpu", "cuda", "triton", "eager")
"""Backends in the order in which `auto` prefers them."""


_USED_FOR = {
    "cpu": "takes dense float16, bfloat16, float32 and float64 gradients on the CPU",
    "cuda": "takes dense float16, bfloat16, float32 and float64 gradients on CUDA devices",
    "triton": "takes dense float16, bfloat16, float32 and float64 gradients on CUDA or ROCm devices",
    "eager": "takes everything that no other backend takes",
}

_chosen: ContextVar[str | None] = ContextVar("fastclip_backend", default=None)


@functools.cache
def _load(name: str) -> Backend:
    return cast(Backend, importlib.import_module(f"fastclip.backends.{name}"))


def _checked(name: str, source: str) -> str:
    if name != "auto" and name not in NAMES:
        raise ValueError(f"{source}: no backend {name!r}; expected one of {', '.join(('auto', *NAMES))}.")
    return name


@functools.cache
def _from_environment() -> str:
    return _checked(os.environ.get("FASTCLIP_BACKEND", "auto").lower(), "FASTCLIP_BACKEND")


def chosen() -> str:
    """Return the name in force: that of the innermost `use_backend`, else of FASTCLIP_BACKEND, else auto."""
    return _chosen.get() or _from_environment()


def choose(name: str) -> Token[str | None]:
    """Use one backend from here on in this context, as `use_backend` does in its block.

    Returns:
        What `ContextVar.reset` takes to go back.
    """
    _checked(name, "use_backend")
    if name != "auto":
        _demanded(name)
    return _chosen.set(name)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Use one backend for every fastclip call inside the `with` block, in this thread or task.

    Args:
        name: "auto" or one of `NAMES`. A named backend never hands tensors on to another: what it
            cannot take raises `BackendUnavailableError`.

    Raises:
        ValueError: no backend has this name.
        BackendUnavailableError: the backend cannot run here.
    """
    token = choose(name)
    try:
        yield
    finally:
        _chosen.reset(token)


def backend_info() -> dict[str, BackendInfo]:
    """Return each backend's state, in the order in which `auto` prefers them."""
    info = {}
    for name in NAMES:
        backend = _load(name)
        reason = backend.unavailable_reason()
        info[name] = BackendInfo(name, reason is None, reason or _USED_FOR[name], backend.details())
    return info


def run(
    operation: Callable[Concatenate[Backend, Asked], Result | Declined],
    *args: Asked.args,
    **kwargs: Asked.kwargs,
) -> Result:
    """Call an operation of the first backend that takes the tensors.

    Args:
        operation: A function of `Backend`, such as `Backend.total_norm`.
        *args: Its arguments.
        **kwargs: None; there for the type checker, who matches them with the function.

    Raises:
        BackendUnavailableError: a backend was demanded by name and cannot take the tensors.
    """
    return run_foreach(None, operation, *args, **kwargs)


def run_foreach(
    foreach: bool | None,
    operation: Callable[Concatenate[Backend, Asked], Result | Declined],
    *args: Asked.args,
    **kwargs: Asked.kwargs,
) -> Result:
    """Do the same with torch's `foreach`, which only eager heeds; False selects eager."""
    if kwargs:
        raise TypeError(f"run: {operation.__name__} takes its arguments by position.")
    return cast(Result, _run(operation.__name__, foreach, *args))


def _run(operation: str, foreach: bool | None, *args: Any) -> Any:
    options = {} if foreach is None else {"foreach": foreach}
    if foreach is False or is_tracing() or (name := chosen()) == "eager":
        return getattr(eager, operation)(*args, **options)
    if type(result := _run_natively(name, operation, *args)) is Declined:
        result = _run_on_several_devices(name, result, options, operation, *args)
    if type(result) is not Declined:
        return result
    if name != "auto":
        raise BackendUnavailableError(_unavailable(name, result.reason))
    return getattr(eager, operation)(*args, **options)


def _run_natively(name: str, operation: str, *args: Any) -> Any:
    """Return what the backend of this name makes of it, or the first of all usable ones that takes it."""
    result: Any = Declined("no backend but eager can run here")
    for backend in _usable() if name == "auto" else (_demanded(name),):
        result = getattr(backend, operation)(*args)
        if type(result) is not Declined:
            return result
    return result


def _run_on_several_devices(
    name: str,
    declined: Declined,
    options: dict[str, bool],
    operation: str,
    listed: list[Tensor],
    *args: Any,
) -> Any:
    """Return what the tensors of each device give together, or `declined` if all are on one."""

    def each(operation: str, *args: Any) -> Any:
        result = _run_natively(name, operation, *args)
        if type(result) is Declined and name == "auto":
            return getattr(eager, operation)(*args, **options)
        return result

    if (several := spread(operation, listed, each)) is None:
        return declined
    if name != "auto" and operation in WRITING:
        # Nothing may be written when another device's gradients are declined.
        for share in several.shares:
            if reason := _demanded(name).reason_not_to_write(share.values):
                return Declined(reason)
    return getattr(several, operation)(*args)


def is_tracing() -> bool:
    """Whether torch must see every operation: a compiler, a tracer or a dispatch mode is at work."""
    return is_compiling() or _len_torch_dispatch_stack() > 0 or _get_tracing_state() is not None


@functools.cache
def _usable() -> tuple[Backend, ...]:
    backends = [_load(name) for name in NAMES if name != "eager"]
    return tuple(backend for backend in backends if backend.unavailable_reason() is None)


def _demanded(name: str) -> Backend:
    backend = _load(name)
    if reason := backend.unavailable_reason():
        raise BackendUnavailableError(_unavailable(name, reason))
    return backend


def _unavailable(name: str, reason: str) -> str:
    others = ", ".join(n for n in ("auto", *NAMES) if n != name)
    return f"fastclip: backend {name!r} cannot be used: {reason}. Choose another with use_backend: {others}."
