"""The calls from a public function to the kernels are those that csrc/README.md lists."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import cuda_library
import pytest
import torch
from triton_interpreter import interpreted, needs_triton

import fastclip
from fastclip import ClippedOptimizer
from fastclip.backends import cpu

__all__ = ["interpreted"]

ROOT = Path(__file__).parents[1]

needs_emulation = pytest.mark.skipif(
    cpu._C is None or cuda_library.compiler() is None, reason="needs the extension and g++"
)


def listed() -> dict[str, list[tuple[str, str]]]:
    """What is listed: title -> (file, function) of each call, the public function first."""
    block = re.search(
        r"```\n(clip_grad_norm_ on the CPU\n.*?)```", (ROOT / "csrc/README.md").read_text(), re.S
    )
    assert block is not None
    found = {}
    for entry in block[1].strip().split("\n\n"):
        title, *calls = entry.splitlines()
        found[title] = [(file, name) for file, name in (call.strip(" >").split(" ") for call in calls)]
    return found


LISTED = listed()


def chain_to(
    is_last: Callable[[FrameType, str, Any], bool], call: Callable[[], object]
) -> list[tuple[str, str]]:
    """The calls of fastclip's own Python at the time of the first event that is the last."""
    found: list[tuple[str, str]] = []

    def watch(frame: FrameType, event: str, what: Any) -> None:
        if found or not is_last(frame, event, what):
            return
        at: FrameType | None = frame
        while at is not None:
            path = Path(at.f_code.co_filename)
            if path.is_relative_to(ROOT / "fastclip"):
                found.insert(0, (str(path.relative_to(ROOT)), at.f_code.co_name))
            at = at.f_back

    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found


def calls_of_c(name: str) -> Callable[[FrameType, str, Any], bool]:
    return lambda frame, event, what: event == "c_call" and what.__name__ == name


def calls_of(file: str, name: str) -> Callable[[FrameType, str, Any], bool]:
    return lambda frame, event, what: (
        event == "call" and frame.f_code.co_name == name and frame.f_code.co_filename == str(ROOT / file)
    )


def parameter() -> torch.nn.Parameter:
    made = torch.nn.Parameter(torch.ones(8))
    made.grad = torch.ones(8)
    return made


@pytest.mark.parametrize(("title", "file", "name"), [(t, f, n) for t in LISTED for f, n in LISTED[t]])
def test_every_call_is_there(title: str, file: str, name: str) -> None:
    assert re.search(rf"\b{name}\(", (ROOT / file).read_text()), f"{title}: {file} has no {name}"


def python_of(title: str) -> list[tuple[str, str]]:
    return [call for call in LISTED[title] if call[0].startswith("fastclip/")]


@pytest.mark.parametrize("title", LISTED)
def test_the_calls_are_few(title: str) -> None:
    assert len(LISTED[title]) - 1 <= (5 if title.startswith("clip") else 6)


@pytest.mark.skipif(cpu._C is None, reason="needs the extension")
def test_the_cpu_clips_by_the_calls_listed() -> None:
    one = parameter()
    found = chain_to(calls_of_c("clip_grad_norm_"), lambda: fastclip.clip_grad_norm_([one], 1.0))
    assert found == python_of("clip_grad_norm_ on the CPU")


@pytest.mark.skipif(cpu._C is None, reason="needs the extension")
def test_the_cpu_steps_by_the_calls_listed() -> None:
    optimizer = ClippedOptimizer(torch.optim.AdamW([parameter()]), 1.0)
    optimizer.step()
    found = chain_to(calls_of_c("adam_step"), optimizer.step)
    assert found == python_of("ClippedOptimizer.step on the CPU")


# Called for an argument; the methods of a class of `_C` themselves are no event.
BEFORE_C = ("fastclip/backends/cuda.py", "_arguments_of")


@needs_emulation
def test_cuda_clips_by_the_calls_listed() -> None:
    with cuda_library.emulated_devices() as devices:
        one = parameter()
        devices.place(one.grad, 0)
        found = chain_to(calls_of(*BEFORE_C), lambda: fastclip.clip_grad_norm_([one], 1.0))
    assert found[:-1] == python_of("clip_grad_norm_ on CUDA")


@needs_emulation
def test_cuda_steps_by_the_calls_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_library.take_steps_of_the_cpu(monkeypatch)
    optimizer = ClippedOptimizer(torch.optim.AdamW([parameter()]), 1.0)
    optimizer.step()
    found = chain_to(calls_of(*BEFORE_C), optimizer.step)
    assert found[:-1] == python_of("ClippedOptimizer.step on CUDA")


@needs_triton
@pytest.mark.usefixtures("interpreted")
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
@pytest.mark.parametrize("operation", ["clip", "step"])
def test_triton_follows_the_calls_listed(operation: str) -> None:
    one = parameter()
    optimizer = ClippedOptimizer(torch.optim.AdamW([one]), 1.0)
    title, call = {
        "clip": ("clip_grad_norm_ by Triton", lambda: fastclip.clip_grad_norm_([one], 1.0)),
        "step": ("ClippedOptimizer.step by Triton", optimizer.step),
    }[operation]
    call()
    *calls, (kernels, _) = LISTED[title]
    assert chain_to(calls_of(*calls[-1]), call) == calls
    assert kernels.startswith("fastclip/kernels/")


def test_an_operation_on_every_element_is_written_in_the_files_listed() -> None:
    """The name of one, as code and not as a function of another library, is nowhere between them."""
    block = re.search(r"```\n(clamp\n.*?)```", (ROOT / "csrc/README.md").read_text(), re.S)
    assert block is not None
    name, *files = block[1].split()
    assert len(files) <= 10
    for file in files:
        assert re.search(rf"{name}|clip_grad_value_", (ROOT / file).read_text()), file
    passed = [
        path
        for folder in ("csrc", "fastclip/backends", "fastclip/kernels")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".h", ".cuh", ".cpp", ".cu", ".py")
        and re.search(rf"^(?!\s*(//|#)).*(?<![:.\w]){name}\b[^_s]", path.read_text(), re.M)
    ]
    assert {str(path.relative_to(ROOT)) for path in passed} <= set(files)
