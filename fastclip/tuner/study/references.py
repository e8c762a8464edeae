"""What a study file refers to: functions by `module:name`, keys and choices by name."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastclip.tuner.errors import ConfigError


def resolve_reference(key: str, reference: Any) -> Any:
    """Import `module:name`.

    Raises:
        ConfigError: no such module or name.
    """
    module, _, name = str(reference).partition(":")
    if not module or not name:
        raise ConfigError(f"resolve_reference: {key} is {reference!r}; expected 'module:name'.")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"resolve_reference: {key} = {reference!r} cannot be imported: {error}.") from error


def check_names(what: str, found: Iterable[str], known: Sequence[str]) -> None:
    """Raise ConfigError for a name that is not known, with the nearest that is."""
    for name in found:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise ConfigError(f"check_keys: {name!r} is no {what}; expected one of {', '.join(known)}.{hint}")


def call(key: str, function: Any, arguments: Mapping[str, Any]) -> Any:
    """Call a function; what it finds wrong with its arguments becomes a ConfigError that names the key."""
    try:
        return function(**arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"build: {key}: {error}") from error
