"""Worker processes that train folds and are replaced when they die or hang."""

from __future__ import annotations

import multiprocessing
import pickle
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from fastclip.tuner.errors import MainGuardError
from fastclip.tuner.executors.base import EpochCallback
from fastclip.tuner.executors.guarding import SENTENCE, UNGUARDED, refuse_typed_in
from fastclip.tuner.executors.starting import start
from fastclip.tuner.training.explosion import Verdict
from fastclip.tuner.training.folds import FoldContext, FoldResult, FoldTask, run_fold

MAX_ATTEMPTS = 2
BEAT_SECONDS = 1.0
START_SECONDS = 120.0  # to import torch on a busy machine
GRACE_SECONDS = 5.0


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    device: torch.device
    task: FoldTask | None = None
    last_sign: float = 0.0
    is_ready: bool = False


class ProcessExecutor:
    """Trains folds in processes of their own, one per device slot.

    On Linux they are forked from a server that has imported torch, and nothing else: each starts at once,
    shares that memory, and has the environment and the limits of memory of this process. Only what is read
    while torch is imported, OMP_NUM_THREADS for one, is that of the first start. Elsewhere, and where the
    server cannot be reached, they are spawned.

    Plain processes, polled, because a pool ends as a whole when one of its processes dies. The study's
    storage stays with the parent: a worker only sends signs of life, epoch records and results.

    Args:
        context: What all folds share; each worker reads it from a temporary file, so it must be picklable.
        devices: One device per worker.
        on_epoch: See `executors.Executor.poll`.
        may_prune: Whether a worker waits for the answer of on_epoch after each epoch.
        hang_timeout: Seconds without a training step after which a worker is replaced.

    Raises:
        TypeError: the context cannot be pickled, or, from poll, not be read by a worker.
        MainGuardError: the script is no file that a worker could run, or, from poll, has no main guard.
    """

    def __init__(
        self,
        context: FoldContext,
        devices: list[torch.device],
        on_epoch: EpochCallback | None = None,
        *,
        may_prune: bool = True,
        hang_timeout: float = 600.0,
    ) -> None:
        refuse_typed_in()
        self.slots = len(devices)
        self._may_prune = may_prune
        payload = _pickle(context)
        # A file, because a worker reads a pipe only after importing torch and would keep the parent waiting.
        self._folder = tempfile.TemporaryDirectory(prefix="fastclip-")
        self._context_path = Path(self._folder.name) / "context.pickle"
        self._context_path.write_bytes(payload)
        self._on_epoch = on_epoch
        self._hang_timeout = hang_timeout
        self._workers = [self._start(device) for device in devices]

    @property
    def pids(self) -> list[int]:
        """The process ids of the workers."""
        return [worker.process.pid for worker in self._workers if worker.process.pid is not None]

    def submit(self, task: FoldTask) -> None:
        """Hand a fold to an idle worker."""
        idle = next((i for i, worker in enumerate(self._workers) if worker.task is None), None)
        if idle is None:
            raise RuntimeError("fastclip bug: a fold was submitted while every worker is busy.")
        self._hand_over(idle, task)

    def poll(self, timeout: float) -> list[FoldResult]:
        """Answer epochs, replace the dead and the hung, return finished folds; wait for the first."""
        deadline = time.monotonic() + timeout
        results: list[FoldResult] = []
        while not results:
            left = max(0.0, deadline - time.monotonic())
            busy = {worker.connection: i for i, worker in enumerate(self._workers) if worker.task is not None}
            for connection in wait(list(busy), min(left, BEAT_SECONDS)):
                results += self._receive(busy[connection])  # type: ignore[index]
            for index in busy.values():
                results += self._replace_if_hung(index)
            if not busy or left == 0.0:
                break
        return results

    def close(self) -> None:
        """Stop all workers, finished or not."""
        for worker in self._workers:
            _stop(worker)
        self._workers = []
        self._folder.cleanup()

    def _start(self, device: torch.device) -> _Worker:
        ours, theirs = multiprocessing.Pipe()
        arguments = (theirs, self._context_path, str(device), self._on_epoch is not None, self._may_prune)
        process = start(_work, arguments)
        theirs.close()
        return _Worker(process, ours, device)

    def _hand_over(self, index: int, task: FoldTask) -> None:
        worker = self._workers[index]
        worker.task, worker.last_sign = task, time.monotonic()
        with suppress(OSError):  # a dead worker's pipe reads as ended in the next poll
            worker.connection.send(task)

    def _receive(self, index: int) -> list[FoldResult]:
        worker = self._workers[index]
        task = worker.task
        if task is None:
            raise RuntimeError("fastclip bug: an idle worker sent a message.")
        try:
            kind, body = worker.connection.recv()
        except (EOFError, OSError):
            return self._lose(index, "the worker process ended")
        worker.last_sign, worker.is_ready = time.monotonic(), True
        if kind == "unreadable":
            raise TypeError(body)
        if kind == "epoch" and self._on_epoch is not None:
            is_pruned = self._on_epoch(task, body)
            worker.last_sign = time.monotonic()  # the callback's time is not the worker's
            if self._may_prune:
                with suppress(OSError):  # read as ended in the next poll
                    worker.connection.send(is_pruned)
        if kind != "result":
            return []
        worker.task = None
        return [body]

    def _replace_if_hung(self, index: int) -> list[FoldResult]:
        worker = self._workers[index]
        silence = time.monotonic() - worker.last_sign
        patience = self._hang_timeout if worker.is_ready else max(self._hang_timeout, START_SECONDS)
        if worker.task is None or silence < patience:
            return []
        return self._lose(index, f"the worker took no step for {silence:.0f} s")

    def _lose(self, index: int, why: str) -> list[FoldResult]:
        """Replace a worker; try its fold again, or give it back as killed."""
        lost = self._workers[index]
        task = lost.task
        if task is None:
            raise RuntimeError("fastclip bug: an idle worker was given up.")
        _stop(lost)
        exit_code = lost.process.exitcode
        if exit_code == UNGUARDED:
            raise MainGuardError(f"ProcessExecutor: {SENTENCE}") from None
        self._workers[index] = self._start(lost.device)
        if task.attempt + 1 < MAX_ATTEMPTS:
            self._hand_over(index, replace(task, attempt=task.attempt + 1))
            return []
        message = f"{why} (exit code {exit_code}), {MAX_ATTEMPTS} times"
        return [FoldResult(task.trial, task.fold, Verdict.KILLED, message=message)]


def _pickle(context: FoldContext) -> bytes:
    try:
        return pickle.dumps(context)
    except (AttributeError, TypeError, pickle.PicklingError) as error:
        raise TypeError(
            f"ProcessExecutor: the study cannot be sent to a worker: {error}; expected model_init, "
            "loss and scoring to be functions at the top level of a module. Use n_jobs=1 to train them here."
        ) from error


def _unreadable(error: Exception) -> str:
    return (
        f"ProcessExecutor: a worker cannot read the study: {type(error).__name__}: {error}; expected "
        "model_init, loss and scoring in a module, or in the script. What is typed into a notebook "
        "or handed to python -c is known to this process alone: put it into a module, or use n_jobs=1."
    )


def _stop(worker: _Worker) -> None:
    worker.connection.close()
    worker.process.terminate()
    worker.process.join(GRACE_SECONDS)
    if worker.process.is_alive():
        worker.process.kill()
        worker.process.join()


def _work(
    connection: Connection,
    context_path: Path,
    device: str,
    has_epoch_callback: bool,
    may_prune: bool,
) -> None:
    """Train folds until the parent is gone: the body of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        payload = context_path.read_bytes()
        try:
            context: FoldContext = pickle.loads(payload)
        except Exception as error:
            connection.send(("unreadable", _unreadable(error)))
            return
        # Spawned, it imports torch's compiler, which would look like a hang in the first fold.
        torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
        connection.send(("ready", None))
        while True:
            task: FoldTask = connection.recv()
            beat = _Beat(connection)
            report = _reporter(connection, may_prune) if has_epoch_callback else None
            result = run_fold(context, task, torch.device(device), on_epoch=report, on_step=beat)
            connection.send(("result", result))
    except (EOFError, OSError):  # the parent is gone, and its end of the pipe or the file with it
        sys.exit(0)


def _reporter(connection: Connection, may_prune: bool) -> Callable[[Any], bool]:
    def report(record: Any) -> bool:
        connection.send(("epoch", record))
        return may_prune and bool(connection.recv())

    return report


class _Beat:
    """Tells the parent once a second that steps are being taken, and ends an orphan."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._parent = multiprocessing.parent_process()
        self._last = time.monotonic()

    def __call__(self) -> None:
        now = time.monotonic()
        if now - self._last < BEAT_SECONDS:
            return
        self._last = now
        if self._parent is None or not self._parent.is_alive():
            sys.exit(0)
        self._connection.send(("beat", None))
