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

from torch._C import _get_tracing_state, _len_torch_dispatch_stack
from torch.compiler import is_compiling

from fastclip.backends import eager
from fastclip.backends.base import Backend, BackendInfo, Declined
from fastclip.backends.devices import WRITING, Spread, spread
from fastclip.errors import BackendUnavailableError

__all__ = ["NAMES", "Backend", "BackendInfo", "Declined", "backend_info", "run", "run_foreach", "use_backend"]

Asked = ParamSpec("Asked")
Result = TypeVar("Result")

NAMES = ("cpu", "cuda", "triton", "eager")
"""Backends in the order in which `auto` prefers them."""

OF_KERNELS = ("clip_and_step", "clip_units_")
"""Operations that eager lacks: who asks for one has another way, and is told why no kernels take it."""

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
    name = operation.__name__
    options = {} if foreach is None else {"foreach": foreach}
    if foreach is False or is_tracing() or (wanted := chosen()) == "eager":
        return cast(Result, getattr(eager, name)(*args, **options))
    result: Any = Declined("no backend but eager can run here")
    reasons: dict[Backend, str] = {}
    for backend in _usable() if wanted == "auto" else (_demanded(wanted),):
        result = getattr(backend, name)(*args)
        if type(result) is not Declined:
            return cast(Result, result)
        reasons[backend] = result.reason
    if name in OF_KERNELS:
        return cast(Result, Declined(_listed(reasons, wanted)))
    if (several := _on_several_devices(foreach, name, args)) is not None:
        if wanted != "auto" and (reason := _reason_not_to_write(_demanded(wanted), name, several)):
            raise BackendUnavailableError(_unavailable(wanted, reason))
        result = getattr(several, name)(*args[1:])
        if type(result) is not Declined:
            return cast(Result, result)
    if wanted != "auto":
        raise BackendUnavailableError(_unavailable(wanted, result.reason))
    return cast(Result, getattr(eager, name)(*args, **options))


def _listed(reasons: dict[Backend, str], wanted: str) -> str:
    """Return why no kernels can be used: what those that were asked said, and why the others were not."""
    found = []
    for name in NAMES:
        backend = _load(name)
        if backend in reasons:
            found.append(f"{name}: {reasons[backend]}")
        elif wanted != "auto":
            found.append(f"{name}: the backend {wanted!r} was chosen")
        elif reason := backend.unavailable_reason():
            found.append(f"{name}: {reason}")
    return "; ".join(found)


def without_kernels() -> str | None:
    """Return why no backend but eager can run here, or None."""
    return None if _usable() else _listed({}, "auto")


def _on_several_devices(foreach: bool | None, operation: str, args: tuple[Any, ...]) -> Spread | None:
    """Return the list that is the first argument as one over several devices; None if it is on one."""

    def each(operation: str, *args: Any) -> Any:
        return run_foreach(foreach, getattr(Backend, operation), *args)

    return spread(operation, args[0], each)


def _reason_not_to_write(backend: Backend, operation: str, several: Spread) -> str | None:
    """Return why nothing may be written: another device's gradients would be declined after those of one."""
    if operation not in WRITING:
        return None
    reasons = (backend.reason_not_to_write(share.values) for share in several.shares)
    return next((reason for reason in reasons if reason), None)


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
