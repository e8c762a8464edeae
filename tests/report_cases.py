"""Studies made up by hand, for the tests of the report."""

from __future__ import annotations

from typing import Any

import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.trial import TrialState

from fastclip.tuner.report import StudyView
from fastclip.tuner.study.opening import SETTINGS_ATTR
from fastclip.tuner.study.output import OutputDir
from fastclip.tuner.study.trial_run import PARAMS_ATTR, STATUS_ATTR, STEPS_ATTR, fold_attr, verdict_of
from fastclip.tuner.training.explosion import TOLD_AS_WORST, WITH_SCORE, Verdict
from fastclip.tuner.training.folds import FoldResult

N_FOLDS = 3
STEPS = 40
LR = FloatDistribution(0.001, 1.0, log=True)
MAX_NORM = FloatDistribution(0.01, 10.0, log=True)


def fold(
    score: float | None = None,
    status: Verdict = Verdict.OK,
    *,
    clip: float = 0.3,
    norms: dict[int, int] | None = None,
    message: str = "",
) -> FoldResult:
    """A fold as a search stores it; a score makes it ok."""
    exploded = status is Verdict.EXPLODED
    reason = {"reason": "the loss is nan", "step": 7, "epoch": 0, "norm_median": 2.0}
    return FoldResult(
        0, 0, status, score=score, metrics={} if score is None else {"accuracy": score},
        steps=7 if exploded else STEPS, planned_steps=STEPS, clip_fraction=clip,
        norm_counts={-3: 10, 0: 25, 4: 5} if norms is None else norms,
        explosion=reason if exploded else None, message=reason["reason"] if exploded else message,
    )  # fmt: skip


def exploded() -> list[FoldResult]:
    return [fold(status=Verdict.EXPLODED)]


def scored(*scores: float, **options: Any) -> list[FoldResult]:
    return [fold(score, **options) for score in scores]


class MadeUpStudy:
    """Collects trials; `view` shows them as a report sees a study.

    Args:
        output: Where epoch records go.
        settings: Settings that differ from the usual.
    """

    def __init__(self, output: OutputDir | None = None, *, name: str = "made up", **settings: Any) -> None:
        self.output = output
        self.settings = {
            "space": {"lr": {"type": "Float", "low": 0.001, "high": 1.0}}, "n_folds": N_FOLDS,
            "n_samples": 90, "primary": "accuracy", "direction": "maximize", "max_epochs": 4,
            "seed": 0, "sampler": "tpe",
            **settings,
        }  # fmt: skip
        self.study = optuna.create_study(study_name=name, direction=self.settings["direction"])
        self.study.set_user_attr(SETTINGS_ATTR, self.settings)

    def add(
        self,
        folds: list[FoldResult],
        *,
        distributions: dict[str, BaseDistribution] | None = None,
        is_told: bool = True,
        **params: Any,
    ) -> MadeUpStudy:
        """Add a trial with these folds and parameters, `lr` and `max_norm` unless others are given."""
        number = len(self.study.trials)
        known = {"lr": LR, "max_norm": MAX_NORM, **(distributions or {})}
        attributes: dict[str, Any] = {PARAMS_ATTR: params}
        for i, result in enumerate(folds):
            result.trial, result.fold = number, i
            attributes[fold_attr(i)] = {k: v for k, v in result.to_dict().items() if k != "history"}
            if self.output is not None:
                self.output.write_history(result)
        status = verdict_of(folds)
        scores = [result.score for result in folds if result.score is not None]
        worst = -float("inf") if self.settings["direction"] == "maximize" else float("inf")
        value = worst if status in TOLD_AS_WORST else sum(scores) / len(scores) if scores else None
        state = TrialState.COMPLETE if status in WITH_SCORE or status in TOLD_AS_WORST else TrialState.FAIL
        if is_told:
            attributes |= {STATUS_ATTR: str(status), STEPS_ATTR: sum(result.steps for result in folds)}
        chosen = {k: v for k, v in params.items() if k in known and v is not None}
        self.study.add_trial(
            optuna.trial.create_trial(
                state=state if is_told else TrialState.RUNNING,
                value=value if is_told and state is TrialState.COMPLETE else None,
                params=chosen,
                distributions={k: known[k] for k in chosen},
                user_attrs=attributes,
            )
        )
        return self

    @property
    def view(self) -> StudyView:
        return StudyView(self.study, self.output)
