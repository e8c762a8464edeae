"""What the tests run on: backends, instruction sets and threads."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Generator, Iterator
from multiprocessing.forkserver import ensure_running

# Before torch loads OpenMP: threads that spin while they wait slow each other down on a shared machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from targets import CPU_TARGETS, EAGER, Target

from fastclip.backends import cpu


@pytest.fixture(params=[*CPU_TARGETS, EAGER], ids=str)
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    """In force: each instruction set of the CPU backend and eager, or what the test asks for."""
    with request.param.in_force():
        yield request.param


@pytest.fixture(params=CPU_TARGETS, ids=str)
def native(request: pytest.FixtureRequest) -> Iterator[Target]:
    """In force: each instruction set of the CPU backend."""
    with request.param.in_force():
        yield request.param


@pytest.fixture(params=[CPU_TARGETS[-1], EAGER], ids=["cpu", "eager"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """In force: each backend of the CPU, with the instruction set that the machine prefers."""
    with request.param.in_force():
        yield request.param.backend


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of torch's threads; put back at the end."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def instruction_sets() -> list[str]:
    """What this machine can run, narrowest first."""
    if cpu._C is None:
        pytest.skip("needs the C++ extension")
    return list(cpu._C.supported_instruction_sets())


@pytest.fixture
def select_instruction_set(instruction_sets: list[str]) -> Iterator[Callable[[str], None]]:
    """Sets the CPU kernels' instruction set; put back at the end."""
    before = cpu._C.instruction_set()
    yield cpu._C.select_instruction_set
    cpu._C.select_instruction_set(before)


def pytest_configure(config: pytest.Config) -> None:
    """Leave out what needs more memory than a small machine has, unless -m asks for a choice of its own."""
    if not config.option.markexpr:
        config.option.markexpr = "not large"


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Let no later collection of garbage walk through thousands of tests and what they have imported."""
    gc.disable()
    try:
        return (yield)
    finally:
        if "programs" in sys.modules:  # whose server is to start before a search starts one that has less
            ensure_running()
        gc.collect()
        gc.freeze()
        gc.enable()
