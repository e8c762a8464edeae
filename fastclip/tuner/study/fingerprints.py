"""Digests of the user's functions, by which a resumed study knows whether they have changed."""

from __future__ import annotations

import functools
import hashlib
import inspect
from types import CodeType
from typing import Any

import torch

PLAIN = (type(None), bool, int, float, complex, str, bytes)


def callable_digest(function: Any, *more: str) -> str:
    """Return the name and a digest of a function or object: its source and what it is configured with.

    Args:
        function: Function, functools.partial, torch module, or object with attributes.
        more: Further text that counts.
    """
    text = "\n".join([describe(function), *more])
    return f"{_name(function)} {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def describe(value: Any, depth: int = 0) -> str:
    """Return text that changes when a value, or the source of a function, does; the same in every process."""
    if isinstance(value, PLAIN):
        return repr(value)
    if isinstance(value, torch.Tensor):
        data = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return f"tensor {tuple(value.shape)} {value.dtype} {hashlib.sha256(data).hexdigest()}"
    if depth > 3:  # far from the function itself
        return type(value).__qualname__
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(describe(item, depth + 1) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {describe(item, depth + 1)}' for key, item in value.items())}}}"
    if isinstance(value, functools.partial):
        return describe([value.func, value.args, value.keywords], depth + 1)
    if inspect.ismethod(value):
        return describe([value.__func__, value.__self__], depth + 1)
    if inspect.isfunction(value):
        closed = inspect.getclosurevars(value).nonlocals
        settings = [closed, value.__defaults__ or (), value.__kwdefaults__ or {}]
        return f"{_source(value)} {describe(settings, depth + 1)}"
    if inspect.isclass(value) or not hasattr(value, "__dict__"):
        return _source(value) if inspect.isclass(value) else type(value).__qualname__
    return f"{_source(type(value))} {describe(vars(value), depth + 1)}"


def _source(value: Any) -> str:
    """Return the source; of a lambda what it was compiled to, since its lines hold the call around it."""
    name = _name(value)
    if getattr(value, "__module__", "").partition(".")[0] == "torch":  # its release is no setting
        return name
    if "<lambda>" in name:
        return f"{name} {_code(value.__code__)}"
    try:
        return f"{name}\n{inspect.getsource(value)}"
    except (OSError, TypeError):  # defined in a prompt, or not in Python
        return f"{name} {_code(value.__code__)}" if hasattr(value, "__code__") else name


def _code(code: CodeType) -> str:
    constants = [_code(const) if isinstance(const, CodeType) else repr(const) for const in code.co_consts]
    return f"{code.co_code.hex()} {code.co_names} {constants}"


def _name(value: Any) -> str:
    if isinstance(value, functools.partial):
        return _name(value.func)
    return str(getattr(value, "__qualname__", type(value).__qualname__))
