"""Early warnings: that they come, what they say, and that they do not come too often."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import monitor_cases as cases
import pytest

import fastclip

WINDOW = 100


def warnings(steps: Iterable[tuple[float, float]], **options: Any) -> list[dict[str, Any]]:
    """What is warned of when two parameters have gradients of these norms, step by step."""
    made = cases.Norms()
    seen: list[dict[str, Any]] = []
    with fastclip.Monitor(
        made.optimizer,
        model=made.model,
        to=[],
        window=WINDOW,
        on_warning=seen.append,
        **{"per_parameter": True, **options},
    ):
        for a, b in steps:
            made.step(a, b)
    return seen


def clipped_steps(num: int, *, of: int, b: float = 0.1) -> list[tuple[float, float]]:
    """So many clipped steps among so many, evenly spread."""
    return [(2.0 if i * num // of != (i + 1) * num // of else 0.5, b) for i in range(of)]


def test_a_rise_of_the_clipped_share(caplog: pytest.LogCaptureFixture) -> None:
    steps = clipped_steps(3, of=WINDOW) + clipped_steps(40, of=WINDOW, b=0.3)
    (warning,) = warnings(steps)
    assert warning["text"] == (
        "the share of clipped steps went from 3 % to 40 % in 200 steps; "
        "the norms of `h.b` grow fastest (3 times)"
    )
    assert (warning["step"], warning["cause"], warning["before"], warning["after"]) == (
        200,
        "clipped",
        0.03,
        0.4,
    )
    assert [record.getMessage() for record in caplog.records] == [f"step 200: {warning['text']}"]
    assert caplog.records[0].name == "fastclip.monitor"


def test_norms_of_every_tenth_step_name_the_module() -> None:
    steps = clipped_steps(0, of=WINDOW) + clipped_steps(25, of=WINDOW, b=0.25)
    (warning,) = warnings(steps, per_parameter=10)
    assert warning["text"].endswith("; the norms of `h.b` grow fastest (2.5 times)")


def test_without_norms_of_parameters_no_module_is_named() -> None:
    steps = clipped_steps(0, of=WINDOW) + clipped_steps(25, of=WINDOW)
    (warning,) = warnings(steps, per_parameter=False)
    assert warning["text"] == "the share of clipped steps went from 0 % to 25 % in 200 steps"


def test_growing_norms() -> None:
    steps = [(0.01, 0.01)] * WINDOW + [(0.02, 0.3)] * WINDOW
    (warning,) = warnings(steps)
    assert warning["text"] == (
        "the median norm went from 0.0141 to 0.301 in 200 steps; the norms of `h.b` grow fastest (30 times)"
    )


def test_skipped_steps() -> None:
    steps = [(0.5, 0.5)] * WINDOW + [(0.5, 0.5)] * (WINDOW - 6) + [(0.5, float("nan"))] * 6
    found = warnings(steps)
    assert [record["kind"] for record in found] == ["nonfinite", "warning"]
    assert found[1]["text"] == "the share of skipped steps went from 0 % to 6 % in 200 steps"


@pytest.mark.parametrize(
    "steps",
    [
        clipped_steps(30, of=4 * WINDOW),
        clipped_steps(90, of=WINDOW) + clipped_steps(10, of=2 * WINDOW),
        clipped_steps(10, of=WINDOW) + clipped_steps(28, of=WINDOW),
        clipped_steps(0, of=50) + clipped_steps(50, of=50) + clipped_steps(50, of=50),
    ],
    ids=["steady", "falling", "within chance", "too early to compare"],
)
def test_nothing_is_warned_of(steps: list[tuple[float, float]]) -> None:
    assert warnings(steps) == []


def test_a_cause_is_told_once_per_window() -> None:
    steps = clipped_steps(0, of=WINDOW) + clipped_steps(WINDOW, of=3 * WINDOW - 1)
    found = warnings(steps + [(2.0, 0.1)] * WINDOW, every=10)
    assert [record["step"] for record in found] == [200, 430]
