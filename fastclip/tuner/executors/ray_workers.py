"""Workers on a Ray cluster that train folds, and are replaced when they or their machine are lost."""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fastclip.tuner.executors.base import EpochCallback
from fastclip.tuner.executors.processes import BEAT_SECONDS, MAX_ATTEMPTS, START_SECONDS
from fastclip.tuner.training.explosion import Verdict
from fastclip.tuner.training.folds import FoldContext, FoldResult, FoldTask, run_fold

try:
    import ray
except ImportError as error:
    raise ImportError(
        "fastclip.tuner: ray is not installed; expected the extra `ray` for executor='ray'. pip install "
        "'fastclip[tune,ray]'"
    ) from error


@dataclass
class _Worker:
    """An actor and the message that is awaited from it.

    Attributes:
        actor: Handle of its `_FoldTrainer` on the cluster.
        device: Where it trains.
        message: Reference to the next message; the first one says that the actor is there.
        task: The fold in hand.
        last_sign: Time of the last message.
        is_ready: Whether the cluster has placed it.
    """

    actor: Any
    device: torch.device
    message: Any
    task: FoldTask | None = None
    last_sign: float = 0.0
    is_ready: bool = False


class RayExecutor:
    """Trains folds in Ray actors, one per slot.

    Connects to the cluster of `ray.init`, of RAY_ADDRESS, or starts one on this machine. A lost actor costs
    its fold, which goes to whichever worker is free next; a new actor waits for the cluster to place it, so
    the search goes on with fewer workers when a machine is gone. The study's storage stays with this process.

    Args:
        context: What all folds share; put into the object store once.
        n_jobs: Number of actors, each with one CPU, or one GPU beside it.
        devices: One device per actor, as the actor sees it; "cuda" asks the cluster for a GPU. None takes
            GPUs when the cluster has one per actor, and CPUs otherwise.
        on_epoch: See `executors.Executor.poll`.
        may_prune: Whether a worker waits for the answer of on_epoch after each epoch.
        hang_timeout: Seconds without a training step after which an actor is replaced.
    """

    def __init__(
        self,
        context: FoldContext,
        n_jobs: int,
        devices: Sequence[Any] | None = None,
        on_epoch: EpochCallback | None = None,
        *,
        may_prune: bool = True,
        hang_timeout: float = 600.0,
    ) -> None:
        self.slots = n_jobs
        self._may_prune = may_prune
        self._on_epoch = on_epoch
        self._hang_timeout = hang_timeout
        self._has_started_ray = not ray.is_initialized()
        if self._has_started_ray:
            ray.init(include_dashboard=False)
        self._context = ray.put(context)
        self._queue: deque[FoldTask] = deque()
        self._workers = [self._start(device) for device in _devices(devices, n_jobs)]
        self._last_ready = time.monotonic()
        self._has_begun = False

    def submit(self, task: FoldTask) -> None:
        """Take a fold; it is handed over to the first worker that is free."""
        self._queue.append(task)

    def poll(self, timeout: float) -> list[FoldResult]:
        """Hand out folds, answer epochs, replace the lost and the hung, return finished folds.

        Raises:
            RuntimeError: the cluster placed no worker for a long time, or the first one to start failed, as
                it does where model_init cannot be imported.
        """
        deadline = time.monotonic() + timeout
        results: list[FoldResult] = []
        while not results:
            self._hand_out()
            left = deadline - time.monotonic()
            if left <= 0:
                break
            self._check_for_workers()
            awaited = {worker.message: i for i, worker in enumerate(self._workers) if _is_awaited(worker)}
            if not awaited:
                break
            ray.wait(list(awaited), timeout=min(left, BEAT_SECONDS))
            ready, _ = ray.wait(list(awaited), num_returns=len(awaited), timeout=0)  # all that is there
            ended = [self._receive(awaited[reference], reference) for reference in ready]
            ended += [self._replace_if_hung(i) for i in range(self.slots)]  # once its messages are read
            results += [result for result in ended if result is not None]
        return results

    def close(self) -> None:
        """Stop all actors, and Ray if it was started here."""
        for worker in self._workers:
            ray.kill(worker.actor)
        self._workers = []
        self._queue.clear()
        if self._has_started_ray:
            ray.shutdown()

    def _start(self, device: torch.device) -> _Worker:
        actor = _FoldActor.options(num_gpus=1 if device.type == "cuda" else 0).remote(
            self._context, str(device), self._on_epoch is not None, self._may_prune
        )
        return _Worker(actor, device, actor.next_message.remote())

    def _hand_out(self) -> None:
        for worker in self._workers:
            if self._queue and worker.is_ready and worker.task is None:
                worker.task, worker.last_sign = self._queue.popleft(), time.monotonic()
                worker.actor.train.remote(worker.task)
                worker.message = worker.actor.next_message.remote()

    def _receive(self, index: int, reference: Any) -> FoldResult | None:
        worker = self._workers[index]
        try:
            kind, body = ray.get(reference)
        except ray.exceptions.RayError as error:
            if not self._has_begun:
                raise RuntimeError(f"RayExecutor: the first worker to start failed: {error}") from error
            return self._lose(index, f"the Ray worker was lost: {str(error).strip().splitlines()[0]}")
        worker.last_sign = time.monotonic()
        if kind == "ready":
            worker.is_ready = self._has_begun = True
            return None
        if worker.task is None:
            raise RuntimeError("fastclip bug: an idle Ray worker sent a message.")
        if kind == "result":
            worker.task = None
            return body  # type: ignore[no-any-return]
        if kind == "epoch" and self._on_epoch is not None:
            is_pruned = self._on_epoch(worker.task, body)
            worker.last_sign = time.monotonic()  # the callback's time is not the worker's
            if self._may_prune:
                worker.actor.answer.remote(is_pruned)
        worker.message = worker.actor.next_message.remote()
        return None

    def _replace_if_hung(self, index: int) -> FoldResult | None:
        worker = self._workers[index]
        silence = time.monotonic() - worker.last_sign
        if worker.task is None or silence < self._hang_timeout:
            return None
        return self._lose(index, f"the Ray worker took no step for {silence:.0f} s")

    def _lose(self, index: int, why: str) -> FoldResult | None:
        """Replace an actor; queue its fold again, or give it back as killed."""
        lost = self._workers[index]
        ray.kill(lost.actor)
        self._workers[index] = self._start(lost.device)
        task = lost.task
        if task is None:
            return None
        if task.attempt + 1 < MAX_ATTEMPTS:
            self._queue.appendleft(replace(task, attempt=task.attempt + 1))
            return None
        return FoldResult(task.trial, task.fold, Verdict.KILLED, message=f"{why}, {MAX_ATTEMPTS} times")

    def _check_for_workers(self) -> None:
        """Raise RuntimeError when no worker has been there for as long as one may take to start."""
        if any(worker.is_ready for worker in self._workers):
            self._last_ready = time.monotonic()
        elif time.monotonic() - self._last_ready > START_SECONDS:
            raise RuntimeError(
                f"RayExecutor: the cluster placed none of {self.slots} workers for {START_SECONDS:.0f} s; it "
                f"has {ray.cluster_resources()}; expected room for one CPU (and GPU, if asked for) each. "
                "Lower n_jobs, or add machines."
            )


def _devices(devices: Sequence[Any] | None, n_jobs: int) -> list[torch.device]:
    if devices is None:
        has_gpus = ray.cluster_resources().get("GPU", 0) >= n_jobs
        devices = ["cuda" if has_gpus else "cpu"]
    if isinstance(devices, (str, torch.device)):
        devices = [devices]
    return [torch.device(devices[i % len(devices)]) for i in range(n_jobs)]


def _is_awaited(worker: _Worker) -> bool:
    return worker.task is not None or not worker.is_ready


class _FoldTrainer:
    """Trains one fold at a time in a thread of its own, and tells of it in messages.

    The executor calls `train`, `next_message` and `answer` at the same time, each in a thread of its own.
    """

    def __init__(self, context: FoldContext, device: str, has_epoch_callback: bool, may_prune: bool) -> None:
        self._context, self._device = context, torch.device(device)
        self._has_epoch_callback, self._may_prune = has_epoch_callback, may_prune
        self._messages: queue.Queue[tuple[str, Any]] = queue.Queue()
        self._answers: queue.Queue[bool] = queue.Queue()
        self._messages.put(("ready", None))
        self._last_beat = 0.0

    def train(self, task: FoldTask) -> None:
        self._messages.put(("beat", None))  # the time before was the cluster's and not the fold's
        report = self._report if self._has_epoch_callback else None
        result = run_fold(self._context, task, self._device, on_epoch=report, on_step=self._beat)
        self._messages.put(("result", result))

    def next_message(self) -> tuple[str, Any]:
        return self._messages.get()

    def answer(self, is_pruned: bool) -> None:
        self._answers.put(is_pruned)

    def _report(self, record: Any) -> bool:
        self._messages.put(("epoch", record))
        return self._may_prune and self._answers.get()

    def _beat(self) -> None:
        now = time.monotonic()
        if now - self._last_beat >= BEAT_SECONDS:
            self._last_beat = now
            self._messages.put(("beat", None))


_FoldActor: Any = ray.remote(num_cpus=1, max_concurrency=3)(_FoldTrainer)
