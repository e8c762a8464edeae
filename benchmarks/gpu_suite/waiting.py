"""Waits for the device, made an error for a while."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def forbidden_waits() -> Iterator[None]:
    """Make torch raise where the host would wait for the device, inside the `with` block only."""
    before = torch.cuda.get_sync_debug_mode()
    try:
        _set_mode("error")
        yield
    finally:
        _set_mode(before)


def _set_mode(mode: int | str) -> None:
    # torch warns of every change that this is a prototype: after it has changed the mode, so where warnings
    # are errors the caller would not learn that it did.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode(mode)
