"""Threads, forks and long runs."""

from __future__ import annotations

import gc
import os
import resource
import sys
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from cases import BY_NAME, parameters_of
from programs import run_python

import fastclip

FORK = """
import os, signal, torch, fastclip
torch.set_num_threads(2)
class WithGrad:
    grad = torch.full((1 << 20,), 3.0)
p = WithGrad()
def measure():
    return fastclip.get_total_norm([p.grad]).item(), fastclip.grad_norms([p]).item()
with fastclip.use_backend("cpu"):
    want = measure()  # a parallel region: its threads do not exist in a child
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        good = measure() == want and fastclip.clip_grad_norm_([p], 1.0).item() == want[0]
        fastclip.clip_grad_value_([p], 1e-9)
        good = good and not fastclip.find_nonfinite([("p", p)]) and p.grad[-1].item() <= 1e-9
        os._exit(0 if good else 3)
    _, status = os.waitpid(child, 0)
    assert measure() == want
print("exit code of the child:", os.waitstatus_to_exitcode(status))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_fork_after_a_parallel_region() -> None:
    done = run_python(FORK)
    assert (done.returncode, done.stdout) == (0, "exit code of the child: 0\n"), done.stderr


def in_threads(work: Any, arguments: list[Any]) -> list[Any]:
    barrier = threading.Barrier(len(arguments))

    def run(argument: Any) -> Any:
        barrier.wait()
        return work(argument)

    with ThreadPoolExecutor(len(arguments)) as pool:
        return list(pool.map(run, arguments))


def test_eight_threads_at_once(backend: str) -> None:
    """Each with its own list; backend and device threads are shared."""
    names = ["many_chunks", "1200_tiny", "mixed_dtypes", "duplicates_in_many_chunks"] * 2

    def work(name: str) -> tuple[list[float], list[torch.Tensor]]:
        with fastclip.use_backend(backend):
            parameters = BY_NAME[name].parameters("cpu", torch.float32)
            norms = [fastclip.clip_grad_norm_(parameters, limit).item() for limit in (90.0, 40.0, 10.0, 1.0)]
            fastclip.clip_grad_value_(parameters, 0.01)
            return norms, [p.grad for p in parameters]

    alone = {name: work(name) for name in set(names)}
    for _ in range(3):
        for name, (norms, grads) in zip(names, in_threads(work, names), strict=True):
            assert norms == alone[name][0]
            assert all(g.equal(h) for g, h in zip(grads, alone[name][1], strict=True))


def test_measuring_one_list_from_several_threads(backend: str) -> None:
    tensors = BY_NAME["many_chunks"].tensors("cpu", torch.bfloat16)

    def work(_: int) -> set[float]:
        with fastclip.use_backend(backend):
            return {fastclip.get_total_norm(tensors).item() for _ in range(20)}

    assert len(set.union(*in_threads(work, list(range(4))))) == 1


class WithGrad:
    """Not a Parameter: torch's own `.grad` does not survive being read and replaced at the same time."""

    def __init__(self, numel: int) -> None:
        self.grad: torch.Tensor | None = torch.ones(numel)


def test_gradients_replaced_by_another_thread() -> None:
    """The gradient in use is held: replacing it frees nothing that is still read or written."""
    parameters = [WithGrad(40_000) for _ in range(20)]
    stop = threading.Event()

    def replace() -> None:
        while not stop.is_set():
            for parameter in parameters:
                parameter.grad = None
                parameter.grad = torch.ones(40_000)

    thread = threading.Thread(target=replace)
    thread.start()
    try:
        for _ in range(200):
            norm = fastclip.clip_grad_norm_(parameters, 1e-3).item()  # type: ignore[arg-type]
            assert 0 <= norm <= (20 * 40_000) ** 0.5 * 1.001
    finally:
        stop.set()
        thread.join()


def test_a_gradient_that_only_its_parameter_holds_survives_the_call() -> None:
    class Fresh:
        """Makes its gradient on every look, as a property may."""

        @property
        def grad(self) -> torch.Tensor:
            return torch.full((100_000,), 2.0)

    parameters = [Fresh() for _ in range(8)]
    assert fastclip.clip_grad_norm_(parameters, 1.0).item() == pytest.approx(2 * 800_000**0.5, rel=1e-6)


def calls(parameters: list[torch.nn.Parameter], count: int) -> None:
    """What leaks would come from: lists, tuples, tensors, references to gradients, reasons, errors."""
    grads = [p.grad for p in parameters if p.grad is not None]
    named = [("p", p) for p in parameters]
    strided = torch.ones(4)[::2]
    for i in range(count // 10):
        for _ in range(4):
            fastclip.clip_grad_norm_(parameters, 1.0)
        fastclip.clip_grad_norm_(parameters, 1e-3 * (i % 2))
        fastclip.get_total_norm(grads, 1.0)
        fastclip.clip_grad_value_(parameters, 0.5)
        fastclip.find_nonfinite(named)
        fastclip.grad_norms(parameters)
        with fastclip.use_backend("cpu"):
            try:
                fastclip.get_total_norm([strided])
            except fastclip.BackendUnavailableError:
                continue
            raise AssertionError("the strided tensor was taken")


def test_a_hundred_thousand_calls_do_not_grow() -> None:
    parameters = parameters_of([torch.ones(8), None, torch.ones(3, dtype=torch.bfloat16)])
    references = [sys.getrefcount(p.grad) for p in parameters[::2]]
    calls(parameters, 2_000)
    gc.collect()
    tracemalloc.start()
    try:
        calls(parameters, 500)
        before_python = tracemalloc.get_traced_memory()[0]
        calls(parameters, 2_000)
        gc.collect()
        grown_python = tracemalloc.get_traced_memory()[0] - before_python
    finally:
        tracemalloc.stop()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    calls(parameters, 100_000)
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert [sys.getrefcount(p.grad) for p in parameters[::2]] == references
    # 16 bytes a call would be 1600 KiB, and 32 KB among the objects that Python counts.
    assert grown_kib < 1024
    assert grown_python < 16_000


def test_errors_hold_no_references() -> None:
    class Raises:
        @property
        def grad(self) -> torch.Tensor:
            raise LookupError

    grad = torch.ones(5)
    (parameter,) = parameters_of([grad])
    before = sys.getrefcount(grad)
    for bad in (Raises(), *parameters_of([torch.ones(4)[::2]])):
        for _ in range(50):
            with fastclip.use_backend("cpu"), pytest.raises((LookupError, fastclip.BackendUnavailableError)):
                fastclip.clip_grad_norm_([parameter, bad], 1.0)
    assert sys.getrefcount(grad) == before
