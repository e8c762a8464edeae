"""Everything that a study was asked for, in one frozen place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral
from pathlib import Path
from typing import Any

from fastclip.tuner.executors.base import EpochCallback, Executor, device_slots
from fastclip.tuner.executors.choosing import check_executor, count_jobs, make_executor
from fastclip.tuner.study.refitting import check_refit_on
from fastclip.tuner.study.samplers import check_sampler, grid_points, make_pruner
from fastclip.tuner.study.spaces import Space, SpaceLike
from fastclip.tuner.study.storage import STALE_SECONDS
from fastclip.tuner.training.explosion import ExplosionRule
from fastclip.tuner.training.folds import FoldContext, ModelInit
from fastclip.tuner.training.losses import LossFunction

DEFAULT_STUDY_NAME = "fastclip"


@dataclass(frozen=True)
class StudySpec:
    """The arguments of a study, named and explained in `TunerCV`; `caller` is its name in messages.

    Made from the arguments as they are; `check` and what reads them refuse the wrong ones.
    """

    model_init: ModelInit
    space: SpaceLike
    caller: str = "TunerCV"

    # what is measured, and on what
    cv: Any = 5
    scoring: Any = None
    refit: bool | str = True
    refit_on: str = "all"
    return_train_score: bool = False

    # how a fold is trained
    max_epochs: int = 10
    patience: int | None = None
    target: float | None = None
    explosion: ExplosionRule | None = None
    loss: LossFunction | None = None
    search_clipped: bool = False
    seed: int = 0
    threads: int | str | None = 1

    # how the search goes
    sampler: Any = "tpe"
    pruner: Any = None
    n_trials: int | None = None
    timeout: float | None = None

    # where folds run
    n_jobs: int | None = 1
    executor: str = "auto"
    devices: Sequence[Any] | None = None
    hang_timeout: float = 600.0

    # where the study is kept
    storage: Any = None
    study_name: str = DEFAULT_STUDY_NAME
    stale_after: int = STALE_SECONDS
    output_dir: str | Path | None = None
    resume: bool = False
    study_attrs: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, estimator: Any, caller: str) -> StudySpec:
        """Return what an estimator that keeps its arguments as attributes was asked for."""
        names = [field.name for field in fields(cls) if field.name != "caller"]
        return cls(**{name: getattr(estimator, name) for name in names}, caller=caller)

    @property
    def jobs(self) -> int:
        """How many folds train at the same time."""
        return count_jobs(self.n_jobs)

    @property
    def parameters(self) -> Space:
        """The space, read."""
        return Space(self.space)

    @property
    def prunes(self) -> bool:
        """Whether a pruner is asked after each epoch."""
        return self.pruner is not None

    def check(self) -> None:
        """Check what needs no data: budget, sampler, pruner, executor, devices.

        Raises:
            ValueError: an argument is out of range or unknown.
            TypeError: an argument has the wrong type.
        """
        check_sampler(self.sampler)
        if self.loss is not None and not callable(self.loss):
            raise TypeError(
                f"{self.caller}: loss={self.loss!r}; expected a function of outputs and targets, such as "
                "torch.nn.CrossEntropyLoss(), or None."
            )
        if self.explosion is not None and not isinstance(self.explosion, ExplosionRule):
            raise TypeError(
                f"{self.caller}: explosion={self.explosion!r}; expected an ExplosionRule or None."
            )
        n_trials: Any = self.n_trials
        if n_trials is not None and not isinstance(n_trials, Integral):
            raise TypeError(f"{self.caller}: n_trials={n_trials!r}; expected a whole number, or None.")
        if self.n_trials is not None and self.n_trials < 1:
            raise ValueError(f"{self.caller}: n_trials={self.n_trials}; expected at least 1, or None.")
        if self.timeout is not None and self.timeout <= 0:
            raise ValueError(f"{self.caller}: timeout={self.timeout}; expected more than 0 seconds, or None.")
        if self.resume and (self.output_dir, self.storage) == (None, None) and isinstance(self.sampler, str):
            raise ValueError(
                f"{self.caller}: resume=True and no study to go on with; expected its output_dir or storage."
            )
        space = self.parameters
        if self.sampler == "grid":
            grid_points(space)
        elif self.n_trials is None and self.timeout is None:
            raise ValueError(
                f"{self.caller}: neither n_trials nor timeout with sampler={self.sampler!r}; expected one of "
                "them. Only a grid ends by itself."
            )
        make_pruner(self.pruner)
        check_refit_on(self.refit_on)
        check_executor(self.executor, self.jobs)
        device_slots(self.devices, self.jobs)

    def make_executor(self, context: FoldContext, on_epoch: EpochCallback | None = None) -> Executor:
        """Start what trains the folds; see `executors.choosing.make_executor`."""
        return make_executor(
            self.executor,
            context,
            n_jobs=self.jobs,
            devices=self.devices,
            on_epoch=on_epoch,
            may_prune=self.prunes,
            hang_timeout=self.hang_timeout,
        )
