"""Where rows are timed: here, or in a process of their own.

What ran before a row in the same process shows in it: small tensors that lie scattered over a recycled heap
cost twice the time of those that were allocated in order. In a fresh process a row is the same whichever
others are asked for.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


class Apply(Protocol):
    """Calls a function of a module's top level somewhere."""

    def __call__(self, function: Callable[..., T], *arguments: Any) -> T:
        """Return what the function returns; what it raises is raised."""


def here(function: Callable[..., T], *arguments: Any) -> T:
    """Call in this process."""
    return function(*arguments)


def apart(function: Callable[..., T], *arguments: Any) -> T:
    """Call in a fresh process, which costs an import of torch; arguments and result travel by pickle.

    Raises:
        BrokenProcessPool: The process was killed, for want of memory for example.
    """
    pool = ProcessPoolExecutor(
        1,
        mp_context=multiprocessing.get_context("spawn"),
        # Ctrl-C ends it without a traceback of its own.
        initializer=signal.signal,
        initargs=(signal.SIGINT, signal.SIG_DFL),
    )
    with pool:
        return pool.submit(function, *arguments).result()
