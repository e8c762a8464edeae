"""What the tests run on: backends, instruction sets and threads."""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

# Before torch loads OpenMP: threads that spin while they wait slow each other down on a shared machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

import fastclip
from fastclip.backends import cpu


@dataclass(frozen=True)
class Target:
    """One way to run a test: a backend on a device, on CPU with one instruction set."""

    backend: str
    device: str
    instruction_set: str | None = None

    def __str__(self) -> str:
        return (self.instruction_set and f"{self.backend}_{self.instruction_set}") or self.backend

    @property
    def is_native(self) -> bool:
        """Whether kernels run, which decline what is not dense and handle powers of any size."""
        return self.backend != "eager"


def _instruction_sets() -> list[str | None]:
    return list(cpu._C.supported_instruction_sets()) if cpu._C else [None]


NATIVE_TARGETS = [Target("cpu", "cpu", name) for name in _instruction_sets()]
TARGETS = [*NATIVE_TARGETS, Target("eager", "cpu")]


def _enter(target: Target) -> Iterator[Target]:
    info = fastclip.backend_info()[target.backend]
    if not info.available:
        pytest.skip(f"needs the {target.backend} backend: {info.reason}")
    before = cpu._C.instruction_set() if target.instruction_set else None
    if target.instruction_set:
        assert cpu._C.select_instruction_set(target.instruction_set)
    try:
        with fastclip.use_backend(target.backend):
            yield target
    finally:
        if before:
            cpu._C.select_instruction_set(before)


@pytest.fixture(params=TARGETS, ids=str)
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    """Each backend, and of the CPU backend each instruction set, in force."""
    yield from _enter(request.param)


@pytest.fixture(params=NATIVE_TARGETS, ids=str)
def native(request: pytest.FixtureRequest) -> Iterator[Target]:
    """Each target that runs kernels, in force."""
    yield from _enter(request.param)


@pytest.fixture(params=["cpu", "eager"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend, in force, with the instruction set that the machine prefers."""
    for entered in _enter(Target(request.param, "cpu")):
        yield entered.backend


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


LONGEST = (
    "test_triton_compile",
    "test_tuner_ray",
    "test_tuner_postgres",
    "test_tuner_workers",
    "test_tuner_cli",
    "test_bench_distributed",
    "test_cuda_build",
    "test_docs",
    "test_wheel",
    "test_optim_examples",
    "test_triton_step",
    "test_distributed",
    "test_distributed_clients",
    "test_demo",
    "test_tuner_report",
    "test_triton_kernels",
    "test_cuda_step",
    "test_demo_studies",
    "test_tuner_mistakes",
    "test_bench",
    "test_strategies_optim",
    "test_tuner_search",
    "test_cuda_kernels",
    "test_demo_tasks",
    "test_demo_charlm",
    "test_norm",
    "test_clip_grad",
)
"""Files that take from more than a minute of a core down to 10 s, in the order to begin with them.

What compiles in several processes comes beside what mostly waits.
"""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Let several processes begin with the longest files, then those of few tests, which are slower tests."""
    if getattr(config.option, "numprocesses", None):
        counts = Counter(item.path for item in items)
        places = {name: place for place, name in enumerate(LONGEST)}
        items.sort(key=lambda item: (places.get(item.path.stem, len(places)), counts[item.path], item.path))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Let no later collection of garbage walk through thousands of tests and what they have imported."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()
