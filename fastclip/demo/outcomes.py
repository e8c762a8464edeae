"""How a run ended, and what a comparison shows: whether clipping made the difference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fastclip.demo.history import History
from fastclip.demo.tasks import Expectation, Task
from fastclip.tuner.training.explosion import ExplosionRule, ExplosionWatch

LEARNED = "learned"
GUESSES = "guesses"
EXPLODED = "exploded"


@dataclass(frozen=True)
class Conclusion:
    """What the runs of a task show.

    Attributes:
        verdict: In half a sentence.
        details: The scores that it stands on; empty where the table says enough.
        failures: Which runs did not end as they should.
    """

    verdict: str
    details: tuple[str, ...] = ()
    failures: tuple[str, ...] = ()


def outcome(task: Task, history: History) -> str:
    """Return `learned`, `guesses`, or since which step a run that ends at guessing was lost.

    A run that explodes and then learns has learned.
    """
    if not task.is_guess(history.test):
        return LEARNED
    watch = ExplosionWatch(ExplosionRule(), task.guessing_loss)
    for step, (loss, norm) in enumerate(zip(history.losses, history.norms, strict=True)):
        if step in history.skipped:
            continue
        if watch.look(loss, norm) is not None:
            return f"nan since {step}" if step == history.nan_step else f"{EXPLODED} at {step}"
    is_far_off = watch.look_at_epoch(history.train.loss, history.test.loss) is not None
    return EXPLODED if is_far_off else GUESSES


def conclude(task: Task, histories: Sequence[History]) -> Conclusion:
    """Return what the runs of a task show, by its expectation, or else by what guessing reaches.

    Args:
        task: What the runs have in common.
        histories: The unclipped run first, then those that are clipped, then those with a batch of NaN.
    """
    if task.expectation is None:
        return _beside_guessing(task, [history for history in histories if not history.run.has_nan])
    failures = _failures(histories, task, task.expectation)
    if failures:
        return Conclusion("The rescue failed", failures=failures)
    rescued = "Unclipped, the network ends at guessing or worse; clipped, it learns"
    if any(history.run.has_nan for history in histories):
        rescued += ". A batch of NaN costs one step with fastclip, the run with torch"
    return Conclusion(rescued)


def _beside_guessing(task: Task, histories: Sequence[History]) -> Conclusion:
    scores = [
        f"{history.run.name} {task.measure.show(history.score)} ({history.outcome})" for history in histories
    ]
    details = (f"{task.measure.name}: {', '.join(scores)}", f"guessing reaches {task.guess}")
    plain = any(history.outcome == LEARNED for history in histories if math.isinf(history.run.max_norm))
    clipped = any(history.outcome == LEARNED for history in histories if math.isfinite(history.run.max_norm))
    if clipped and not plain:
        return Conclusion("Rescued: unclipped, the network ends at guessing; clipped, it learns", details)
    if clipped and plain:
        return Conclusion(_compare(task, histories), details)
    if plain:
        return Conclusion("Clipped too low: the network learns unclipped, and not clipped", details)
    return Conclusion("Not rescued: the network ends at guessing unclipped, and clipped", details)


def _compare(task: Task, histories: Sequence[History]) -> str:
    """Say which of the runs that learned are clearly better, if any are."""
    learned = [history for history in histories if history.outcome == LEARNED]
    plain, clipped = (
        [history.test for history in learned if math.isfinite(history.run.max_norm) is is_clipped]
        for is_clipped in (False, True)
    )
    if all(any(task.is_clearly_better(marks, other) for marks in clipped) for other in plain):
        return "Better clipped: the network learns unclipped, and more clipped"
    if all(any(task.is_clearly_better(marks, other) for marks in plain) for other in clipped):
        return "Clipped too low: the network learns unclipped, and less clipped"
    return "Nothing to rescue: the network learns unclipped, and clipped"


def _failures(histories: Sequence[History], task: Task, expectation: Expectation) -> tuple[str, ...]:
    """Say which runs did not end as they should."""
    measure = task.measure
    failures: list[str] = []
    for history in histories:
        run, skipped = history.run, history.stats.skipped
        bound = expectation.clipped if run.learns else expectation.unclipped
        if measure.is_at_least(history.score, bound) is not run.learns:
            failures.append(
                f"{run.name} reached {measure.show(history.score)}, expected "
                f"{'at least as good as' if run.learns else 'worse than'} {measure.show(bound)}"
            )
        if skipped != run.expected_skips:
            failures.append(f"{run.name} skipped {skipped} steps, expected {run.expected_skips}")
    return tuple(failures)
