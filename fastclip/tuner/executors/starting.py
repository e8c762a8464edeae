"""How worker processes start, and what they have of this one: its environment and its limits of memory."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import Any

from fastclip.tuner.executors.guarding import WORKER_NAME

# torch, and the compiler that it imports with the first optimizer; neither asks for a device.
PRELOADED = ["torch._dynamo"]


def start(body: Callable[..., None], arguments: tuple[Any, ...]) -> BaseProcess:
    """Start a worker that runs body(*arguments)."""
    try:
        process = start_by(start_method(), body, arguments)
    except (OSError, EOFError):  # the server cannot start, or is that of the process that forked this one
        process = start_by(multiprocessing.get_context("spawn"), body, arguments)
    _limit(process)
    return process


def start_by(context: BaseContext, body: Callable[..., None], arguments: tuple[Any, ...]) -> BaseProcess:
    """Start a worker by one method, with the environment of this process."""
    process: BaseProcess = context.Process(  # type: ignore[attr-defined]
        target=body, args=arguments, daemon=True, name=_Surroundings(WORKER_NAME)
    )
    process.start()
    return process


def start_method() -> BaseContext:
    """Return how processes start. A fork of this one would have its threads' locks and its CUDA contexts."""
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    from multiprocessing.forkserver import _forkserver

    context = multiprocessing.get_context("forkserver")
    # The server may be the user's, too. The script stays out: each worker finds out whether it is guarded.
    asked = getattr(_forkserver, "_preload_modules", [])
    asked = [name for name in asked if name not in ("__main__", *PRELOADED)]
    context.set_forkserver_preload(asked + PRELOADED)
    return context


class _Surroundings(str):
    """A worker's name that, unpickled, sets its environment: before anything of the user's is imported there.

    The name is what a worker unpickles first. It may not find fastclip by then, so builtins do it.
    """

    def __reduce__(self) -> tuple[Callable[..., str], tuple[str, dict[str, Any]]]:
        code = "(here := __import__('os').environ).clear() or here.update(environment) or name"
        return eval, (code, {"environment": dict(os.environ), "name": str(self)})


def _limit(process: BaseProcess) -> None:
    """Give a process the limits of memory of this one, which a server has had from its own start."""
    if sys.platform == "linux" and process.pid is not None:
        import resource

        for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA):
            with suppress(ProcessLookupError):  # it has ended
                resource.prlimit(process.pid, kind, resource.getrlimit(kind))
