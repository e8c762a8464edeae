"""Early warnings: what the latest window of steps has that the one before had not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastclip.monitor.history import History

CLIPPED_RISE = 0.2
"""Rise of the share of clipped steps that is warned of; of 100 steps, chance makes 0.07."""
SKIPPED_SHARE = 0.05
"""Share of skipped steps that is warned of, if it has doubled."""
NORM_GROWTH = 10.0
"""Growth of the median norm that is warned of."""


class Alarms:
    """Compares the two windows of a history; tells of a cause once until a window has passed.

    Args:
        history: The latest steps.
        modules: Name -> positions of its parameters.
    """

    def __init__(self, history: History, modules: dict[str, list[int]]) -> None:
        self._history, self._modules = history, modules
        self._quiet_until: dict[str, int] = {}

    def check(self, step: int) -> list[dict[str, Any]]:
        """Return the warnings at a step as records: cause, before, after, text."""
        if not self._history.is_full:
            return []
        found = []
        for cause, before, after, text in self._rules():
            if step >= self._quiet_until.get(cause, 0):
                self._quiet_until[cause] = step + self._history.window
                found.append(
                    {"cause": cause, "before": before, "after": after, "text": text + self._fastest()}
                )
        return found

    def _rules(self) -> Iterator[tuple[str, float, float, str]]:
        num_steps = 2 * self._history.window
        before, after = self._history.shares("clipped")
        if after - before >= CLIPPED_RISE:
            text = f"the share of clipped steps went from {_percent(before)} to {_percent(after)}"
            yield "clipped", before, after, f"{text} in {num_steps} steps"
        before, after = self._history.shares("skipped")
        if after >= SKIPPED_SHARE and after >= 2 * before:
            text = f"the share of skipped steps went from {_percent(before)} to {_percent(after)}"
            yield "skipped", before, after, f"{text} in {num_steps} steps"
        before, after = self._history.medians()
        if after >= NORM_GROWTH * before:
            text = f"the median norm went from {before:.3g} to {after:.3g}"
            yield "norm", before, after, f"{text} in {num_steps} steps"

    def _fastest(self) -> str:
        found = self._history.fastest(self._modules)
        if found is None or found[1] <= 1:
            return ""
        return f"; the norms of `{found[0]}` grow fastest ({found[1]:.3g} times)"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
