"""What to do next, drawn from what a study has seen."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution

from fastclip.tuner.report.study_view import StudyView, clip_fraction, number
from fastclip.tuner.study import advice
from fastclip.tuner.study.records import TrialRecord
from fastclip.tuner.training.explosion import Verdict

EDGE_SHARE = 0.05  # of the searched range, in which the best value counts as lying at the edge
LOG_EXTENSION = 10.0
HIGH_EXPLOSION_SHARE = 1 / 3
HIGH_CLIP_FRACTION = 0.9
LOW_CLIP_FRACTION = 0.01
LATE_SHARE = 0.2  # of the search, in which a best trial counts as found late
MIN_TRIALS_TO_BE_LATE = 10
MIN_EPOCHS_FOR_TREND = 3
OVERFITTING_FACTOR = 1.1


def next_steps(view: StudyView) -> list[str]:
    """Return what the study calls for, the most urgent first; never empty."""
    if not view.records:
        return [
            "No trial has finished: resume the search (resume=True, --resume), "
            "or look at the message that it ended with."
        ]
    steps = list(_unfinished(view))
    if view.best is None:
        exploded = [record for record in view.records if record.status is Verdict.EXPLODED]
        return [*steps, *_failures(view), *(advice.after_explosions(exploded) if exploded else [])]
    steps += [
        *_explosions(view),
        *_collapses(view, view.best),
        *_failures(view),
        *_edges(view, view.best),
        *_clipping(view.best),
        *_epochs(view, view.best),
        *_late(view, view.best),
        *_undecided(view, view.best),
    ]
    if not steps:
        steps.append(
            "Nothing stands in the way: the best trial lies inside the space and its folds agree. Use its "
            "parameters."
        )
    if len(view.ranked) > 1:
        steps.append(
            f"The best of {len(view.ranked)} scores flatters itself. For the score to expect on new data, "
            "keep a test set apart, or run nested_cv."
        )
    return steps


def _unfinished(view: StudyView) -> Iterator[str]:
    planned = view.run.get("n_trials")
    if view.num_under_way:
        yield (
            f"{view.num_under_way} trial(s) are under way or were interrupted: resume the search "
            "(resume=True, --resume), it goes on at the fold where it stopped."
        )
    elif planned and len(view.records) < planned:
        yield (
            f"{len(view.records)} of {planned} trials have finished: resume the search (resume=True, "
            "--resume)."
        )


def _explosions(view: StudyView) -> Iterator[str]:
    exploded = [record for record in view.records if record.status is Verdict.EXPLODED]
    share = len(exploded) / len(view.records)
    if share <= HIGH_EXPLOSION_SHARE:
        return
    sentence = f"{len(exploded)} of {len(view.records)} trials exploded ({share:.0%})."
    unclipped = sum(record.params.get("max_norm") is None for record in exploded)
    trained, lost = _rates(view.ranked), _rates(exploded)
    if 0 < unclipped < len(exploded):
        sentence += f" {unclipped} of them did not clip."
    if trained and lost and max(lost) > max(trained):
        sentence += (
            f" No rate above {max(trained):.3g} trained, and rates up to {max(lost):.3g} were tried: "
            f"lower the upper end of the rate to {max(trained):.2g}."
        )
    elif unclipped == len(exploded):
        sentence += " None of them clipped: search max_norm, which keeps the same rates stable."
    else:
        sentence += (
            " Rates that explode and rates that train overlap: search lr_x_max_norm with max_norm, which "
            "separates the two, or a lower max_norm."
        )
    yield sentence


def _collapses(view: StudyView, best: TrialRecord) -> Iterator[str]:
    collapsed = [record for record in view.records if record.status is Verdict.COLLAPSED]
    learned = _rates([record for record in view.ranked if record.status is Verdict.OK])
    if best.status is Verdict.COLLAPSED:
        yield (
            "The best trial ends at guessing on one fold at least: its score is that of a model that sees "
            "no input. Search lower and higher rates, another init and more epochs, and check that the "
            "targets belong to their inputs."
        )
    elif collapsed:
        sentence = f"{len(collapsed)} of {len(view.records)} trials collapsed: they end at guessing."
        rates = _rates(collapsed)
        if learned and rates and max(rates) > max(learned):
            sentence += (
                f" Rates up to {max(rates):.3g} did, and none above {max(learned):.3g} learned: a step "
                "that is too long leaves a network dead. Lower the upper end of the rate, or max_norm."
            )
        elif learned and rates and min(rates) < min(learned):
            sentence += (
                f" Rates down to {min(rates):.3g} did, and none below {min(learned):.3g} learned: raise the "
                "lower end of the rate, or max_epochs."
            )
        yield sentence


def _failures(view: StudyView) -> Iterator[str]:
    if count := view.counts[Verdict.OOM]:
        yield f"{count} trial(s) ran out of memory: lower batch_size or the size of the model in the space."
    if count := view.counts[Verdict.OUT_OF_TIME]:
        yield f"{count} trial(s) were under way when the time budget ended: raise timeout to finish them."
    if count := view.counts[Verdict.KILLED]:
        yield (
            f"{count} trial(s) lost their worker twice: look at the memory of the machine, or raise "
            "hang_timeout if a step takes that long."
        )
    if count := view.counts[Verdict.ERROR]:
        failed = next(record for record in view.records if record.status is Verdict.ERROR)
        message = next(fold.message for fold in failed.folds if fold.message).strip().splitlines()[-1]
        yield f"{count} trial(s) ended in an error; the first, trial {failed.number}, said: {message}"
    if degenerate := sum(fold.status is Verdict.DEGENERATE for fold in view.records[0].folds):
        yield (
            f"{degenerate} fold(s) lack a class in their training part and were left out: use a stratified "
            "splitter."
        )


def _edges(view: StudyView, best: TrialRecord) -> Iterator[str]:
    for name, distribution in view.distributions.items():
        value = number(best.chosen.get(name))
        edge = None if value is None else _edge(value, distribution)
        if value is None or edge is None:
            continue
        side, bound, further = edge
        worst = _explodes_beyond(view, name, value, side)
        sentence = f"The best {name}, {value:.3g}, lies at the {side} end of its range ({bound:.3g})"
        if worst:
            yield f"{sentence}, next to the region that explodes: that border, not the range, limits it."
        elif further is not None:
            yield f"{sentence}: widen the range to {further:.3g}."


def _edge(value: float, distribution: BaseDistribution) -> tuple[str, float, float | None] | None:
    """Return at which end of its range a value lies, the end, and a bound to try; None inside."""
    if not isinstance(distribution, (FloatDistribution, IntDistribution)):
        return None
    low, high = float(distribution.low), float(distribution.high)
    if low == high:
        return None
    is_log = distribution.log
    position, start, end = (math.log(v) if is_log else v for v in (value, low, high))
    share = (position - start) / (end - start)
    if share < EDGE_SHARE:
        # A linear range that begins at 0 ends there by nature: rates, dropout and penalties are not negative.
        further = low / LOG_EXTENSION if is_log else (low - (high - low) if low < 0 else None)
        return "lower", low, further
    if share > 1 - EDGE_SHARE:
        return "upper", high, high * LOG_EXTENSION if is_log else high + (high - low)
    return None


def _explodes_beyond(view: StudyView, name: str, value: float, side: str) -> bool:
    """Tell whether trials at or beyond the best value on this side exploded more often than not."""
    beyond = [
        record.status is Verdict.EXPLODED
        for record in view.records
        if (other := number(record.chosen.get(name))) is not None
        and (other > value if side == "upper" else other < value)
    ]
    return bool(beyond) and float(np.mean(beyond)) > 0.5


def _clipping(best: TrialRecord) -> Iterator[str]:
    share, max_norm = clip_fraction(best), number(best.params.get("max_norm"))
    if max_norm is None:
        return
    if share > HIGH_CLIP_FRACTION:
        rate = number(best.params.get("lr"))
        length = "" if rate is None else f", and lr * max_norm = {rate * max_norm:.3g} their length"
        yield (
            f"The best trial clipped {share:.0%} of its steps: the gradient gives only their direction"
            f"{length}. Try larger thresholds at the same product: search lr_x_max_norm with max_norm."
        )
    elif share < LOW_CLIP_FRACTION:
        yield (
            f"The threshold of the best trial, {max_norm:.3g}, clipped {share:.1%} of its steps: at its rate "
            "clipping is only a safety net. Keep it, or look for gains at higher rates and lower thresholds."
        )


def _epochs(view: StudyView, best: TrialRecord) -> Iterator[str]:
    curves = view.curves(best)
    shared = min((len(curve) for curve in curves), default=0)
    if shared < MIN_EPOCHS_FOR_TREND:
        return
    primary, max_epochs = view.settings["primary"], view.settings["max_epochs"]
    scores = view.sign * np.mean([[e[primary] for e in curve[:shared]] for curve in curves], axis=0)
    losses = np.mean([[e["loss"] for e in curve[:shared]] for curve in curves], axis=0)
    lowest = int(losses.argmin())
    if shared == max_epochs and scores.argmax() == shared - 1 and lowest == shared - 1:
        yield (
            f"The best trial was still improving in its last epoch: raise max_epochs above {max_epochs}, "
            "with patience to stop in time."
        )
    elif losses[-1] > OVERFITTING_FACTOR * losses[lowest] and lowest < shared - 1:
        yield (
            f"The held-out loss of the best trial is lowest after epoch {lowest + 1} and rises to "
            f"{losses[-1]:.3g} from {losses[lowest]:.3g}: set patience, or search weight_decay and dropout."
        )


def _late(view: StudyView, best: TrialRecord) -> Iterator[str]:
    place = view.records.index(best) + 1
    total = len(view.records)
    is_grid = view.settings["sampler"] == "grid"
    if not is_grid and total >= MIN_TRIALS_TO_BE_LATE and place > (1 - LATE_SHARE) * total:
        yield f"The best trial came late ({place} of {total}): a longer search may well find a better one."


def _undecided(view: StudyView, best: TrialRecord) -> Iterator[str]:
    scores = [fold.score for fold in best.folds if fold.score is not None]
    if len(scores) < 2 or best.score is None:
        return
    error = float(np.std(scores, ddof=1)) / math.sqrt(len(scores))
    near = [r for r in view.ranked[1:] if r.score is not None and abs(best.score - r.score) < error]
    if near:
        yield (
            f"{len(near)} other trial(s) score within one standard error of the best ({error:.2g} over "
            f"{len(scores)} folds), trial {near[0].number} first: the search does not tell them apart. "
            "Prefer the lower rate among them, or give more folds."
        )


def _rates(records: list[TrialRecord]) -> list[float]:
    rates = (number(record.params.get("lr")) for record in records)
    return [rate for rate in rates if rate is not None]
