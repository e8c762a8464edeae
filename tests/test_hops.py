"""The calls from a public function to the kernels are those that csrc/README.md lists."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from triton_interpreter import interpreted, needs_triton

import fastclip
from fastclip import ClippedOptimizer
from fastclip.backends import cpu

__all__ = ["interpreted"]

ROOT = Path(__file__).parents[1]


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


def parameter() -> torch.nn.Parameter:
    made = torch.nn.Parameter(torch.ones(8))
    made.grad = torch.ones(8)
    return made


@pytest.mark.parametrize(("title", "file", "name"), [(t, f, n) for t in LISTED for f, n in LISTED[t]])
def test_every_call_is_there(title: str, file: str, name: str) -> None:
    assert re.search(rf"\b{name}\(", (ROOT / file).read_text()), f"{title}: {file} has no {name}"


@pytest.mark.skipif(cpu._C is None, reason="needs the extension")
def test_the_cpu_clips_by_the_calls_listed() -> None:
    one = parameter()
    found = chain_to(calls_of_c("clip_grad_norm_"), lambda: fastclip.clip_grad_norm_([one], 1.0))
    expected = LISTED["clip_grad_norm_ on the CPU"]
    assert found == [call for call in expected if call[0].startswith("fastclip/")]
    assert len(expected) - 1 <= 5


@pytest.mark.skipif(cpu._C is None, reason="needs the extension")
def test_the_cpu_steps_by_the_calls_listed() -> None:
    optimizer = ClippedOptimizer(torch.optim.AdamW([parameter()]), 1.0)
    optimizer.step()
    found = chain_to(calls_of_c("adam_step"), optimizer.step)
    expected = LISTED["ClippedOptimizer.step on the CPU"]
    assert found == [call for call in expected if call[0].startswith("fastclip/")]
    assert len(expected) - 1 <= 6


@needs_triton
@pytest.mark.usefixtures("interpreted")
def test_triton_clips_by_the_calls_listed() -> None:
    one = parameter()

    def launches(frame: FrameType, event: str, what: Any) -> bool:
        return (
            event == "call" and frame.f_code.co_name == "total_norm" and "kernels" in frame.f_code.co_filename
        )

    with fastclip.use_backend("triton"):
        found = chain_to(launches, lambda: fastclip.clip_grad_norm_([one], 1.0))
    *calls, (kernels, _) = LISTED["clip_grad_norm_ by Triton"]
    assert found == calls
    assert kernels == "fastclip/kernels/norm.py"
