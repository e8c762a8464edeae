"""Processes that are the ranks of a gloo group, kept for the session, and run functions all together."""

from __future__ import annotations

import contextlib
import datetime
import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from programs import forkserver

TIMEOUT = datetime.timedelta(seconds=40)
"""After which a collective that not all ranks have joined is an error, and no hang."""

_START = 120.0


def _serve(rank: int, world: int, store: str, connection: Any) -> None:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=TIMEOUT
    )
    connection.send((True, None))
    while (call := connection.recv()) is not None:
        function, args = call
        try:
            answer = True, function(*args)
        except BaseException:  # what a rank raises is the caller's to see
            answer = False, traceback.format_exc()
        connection.send(answer)


class RanksError(AssertionError):
    """What ranks raised, or that they hang."""


class Ranks:
    """The processes of one world size."""

    def __init__(self, world: int) -> None:
        self.world = world
        self._folder = tempfile.TemporaryDirectory()
        self._connections, self._processes = [], []
        for rank in range(world):
            ours, theirs = forkserver.Pipe()
            args = (rank, world, str(Path(self._folder.name) / "store"), theirs)
            process = forkserver.Process(target=_serve, args=args, daemon=True)
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)
        self._answers(_START)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Return what function(*args), of a module, returns on each rank."""
        for connection in self._connections:
            connection.send((function, args))
        return self._answers(2.5 * TIMEOUT.total_seconds())

    def _answers(self, seconds: float) -> list[Any]:
        answers, faults = [], []
        for rank, connection in enumerate(self._connections):
            try:
                if not connection.poll(seconds):
                    raise EOFError
                good, answer = connection.recv()
            except (EOFError, OSError):
                good, answer = False, "no answer: it hangs, or has died"
            answers.append(answer)
            if not good:
                faults.append(f"rank {rank}: {answer}")
        if faults:
            self.close()
            _started.pop(self.world, None)
            raise RanksError("\n".join(faults))
        return answers

    def close(self) -> None:
        for connection, process in zip(self._connections, self._processes, strict=True):
            with contextlib.suppress(OSError):
                connection.send(None)
            process.join(5)
            if process.is_alive():
                process.kill()
        self._folder.cleanup()


_started: dict[int, Ranks] = {}


def ranks(world: int) -> Ranks:
    """Return the processes of one world size, started when they are first wanted."""
    if world not in _started:
        _started[world] = Ranks(world)
    return _started[world]
