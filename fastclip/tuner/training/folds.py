"""Run one fold: a pure function of the study's seed, the fold and the parameters."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fastclip.tuner.training.batching import Indices, batch_size_of
from fastclip.tuner.training.data import TuningData
from fastclip.tuner.training.explosion import Verdict
from fastclip.tuner.training.guessing import collapse
from fastclip.tuner.training.initialisation import initialise
from fastclip.tuner.training.loop import Objective, evaluate, train
from fastclip.tuner.training.regularisation import set_dropout
from fastclip.tuner.training.seeding import derive_seed, seeded
from fastclip.tuner.training.splits import Split, missing_classes
from fastclip.tuner.training.stepping import EpochRecord, TrainingRun, call

ModelInit: TypeAlias = Callable[[dict[str, Any]], nn.Module]


@dataclass(frozen=True)
class FoldContext:
    """What is the same for every fold of a study; it is sent to each worker once.

    With `has_train_scores` the model of each fold is measured on its training part, too. `model` is the
    first model as text, and fixes with the other settings what a study may be resumed with.
    """

    model_init: ModelInit
    data: TuningData
    splits: list[Split]
    objective: Objective
    seed: int
    threads: int | None
    has_train_scores: bool = False
    model: str = ""


@dataclass(frozen=True)
class FoldTask:
    """One fold of one trial, to be trained until the deadline at most (seconds since the epoch)."""

    trial: int
    fold: int
    params: dict[str, Any]
    attempt: int = 0
    deadline: float | None = None


@dataclass
class FoldResult:
    """How one fold ended.

    Attributes:
        trial: Number of the trial.
        fold: Index of the split.
        status: The verdict.
        score: Score of the primary measure; None unless the verdict is ok or collapsed.
        metrics: Held-out metrics of the epoch that counts: the last one, or the best with patience.
        train_metrics: The same of its training part, when they are asked for.
        confusion: Its confusion matrix, a row for each true class, or None.
        history: One record per epoch, see `TrainingRun`.
        epochs: Epochs trained up to the one that counts.
        steps: Optimizer steps survived.
        planned_steps: Steps that max_epochs would take.
        clip_fraction: Share of the steps that were clipped.
        norm_counts: Steps per tenth of a decade of the gradient norm, see `TrainingRun`.
        fit_seconds: Wall time of training.
        score_seconds: Wall time of evaluation.
        explosion: Reason, step, epoch, loss and norm of an explosion.
        message: What went wrong, for any other verdict than ok.
    """

    trial: int
    fold: int
    status: Verdict
    score: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    train_metrics: dict[str, float] = field(default_factory=dict)
    confusion: list[list[int]] | None = None
    history: list[EpochRecord] = field(default_factory=list)
    epochs: int = 0
    steps: int = 0
    planned_steps: int = 0
    clip_fraction: float = 0.0
    norm_counts: dict[int, int] = field(default_factory=dict)
    fit_seconds: float = 0.0
    score_seconds: float = 0.0
    explosion: dict[str, Any] | None = None
    message: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain values."""
        return {**asdict(self), "status": str(self.status)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FoldResult:
        """Rebuild a result from `to_dict`, also after a trip through JSON."""
        counts = {int(key): count for key, count in values.get("norm_counts", {}).items()}
        return cls(**{**values, "status": Verdict(values["status"]), "norm_counts": counts})


def run_fold(
    context: FoldContext,
    task: FoldTask,
    device: torch.device,
    *,
    on_epoch: Callable[[EpochRecord], bool] | None = None,
    on_step: Callable[[], None] | None = None,
) -> FoldResult:
    """Train a fresh model on one fold and measure it; whatever goes wrong becomes the verdict.

    The result is a function of the study's seed, the fold and the parameters: neither the trial's number
    nor what ran before matters, so folds are paired across trials.

    Args:
        context: What all folds share.
        task: Which fold, with which parameters.
        device: Where to train.
        on_epoch: Called with each epoch's record; True prunes.
        on_step: Called after each step, as a sign of life.
    """
    split = context.splits[task.fold]
    missing = missing_classes(context.data, split)
    if missing:
        return FoldResult(
            task.trial,
            task.fold,
            Verdict.DEGENERATE,
            message=f"classes {missing} occur in the test part and never in the training part",
        )
    seed = derive_seed(context.seed, task.fold)
    try:
        with torch_threads(context.threads), seeded(seed, device):
            model = build_model(context.model_init, context.data, task.params, split[0], device)
            run = train(
                model,
                context.data.to(device),
                *split,
                task.params,
                context.objective,
                seed=seed,
                device=device,
                on_epoch=on_epoch,
                on_step=on_step,
                deadline=task.deadline,
            )
            labels = context.data.labels[split[1]]
            result = _judge(task, run, context.objective, labels[labels != context.data.ignore_index])
            if context.has_train_scores and result.score is not None:
                data = context.data.to(device)
                amp = task.params.get("amp")
                result.train_metrics = evaluate(model, data, split[0], context.objective, device, amp)[0]
            return result
    except Exception as error:  # the user's model may raise anything; the study goes on
        status = Verdict.OOM if _is_out_of_memory(error) else Verdict.ERROR
        return FoldResult(task.trial, task.fold, status, message=traceback.format_exc())


def build_model(
    model_init: ModelInit, data: TuningData, params: dict[str, Any], rows: Indices, device: torch.device
) -> nn.Module:
    """Call model_init and apply `dropout`, `init` and `init_gain` to what it returns.

    Data-dependent initialisation sees the first mini-batch of `rows`.

    Raises:
        TypeError: model_init does not return a torch module.
    """
    model = model_init(dict(params))
    if not isinstance(model, nn.Module):
        raise TypeError(f"model_init returned a {type(model).__name__}; expected a torch.nn.Module.")
    model.to(device)
    inputs = data.batch(rows[: batch_size_of(params, data)], device)[0]
    if any(isinstance(p, nn.parameter.UninitializedParameter) for p in model.parameters()):
        with torch.no_grad():
            call(model, inputs)
    if params.get("dropout") is not None:
        set_dropout(model, float(params["dropout"]))
    init = params.get("init") or "default"
    gain = 1.0 if init == "default" else float(params.get("init_gain", 1.0))
    return initialise(model, init, gain, inputs)


@contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """Give torch this many threads inside the block: the number may change the last bits of a sum."""
    before = torch.get_num_threads()
    if threads is None or threads == before:
        yield
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _judge(task: FoldTask, run: TrainingRun, objective: Objective, labels: npt.NDArray[Any]) -> FoldResult:
    result = FoldResult(
        task.trial,
        task.fold,
        Verdict.OK,
        history=run.history,
        steps=run.steps,
        planned_steps=run.planned_steps,
        clip_fraction=run.clip_fraction,
        norm_counts=run.norm_counts,
        fit_seconds=run.fit_seconds,
        score_seconds=run.score_seconds,
        explosion=run.explosion,
        confusion=run.confusion,
    )
    if run.explosion is not None:
        result.status, result.message = Verdict.EXPLODED, run.explosion["reason"]
        return result
    if run.is_out_of_time:
        result.status = Verdict.OUT_OF_TIME
        result.message = f"the time budget ended after {run.steps} of {run.planned_steps} steps"
        return result
    primary = objective.scoring.primary
    record = run.history[-1]
    if objective.stop.patience is not None:
        scores = np.asarray([epoch[primary] for epoch in run.history])
        best = scores.argmax() if objective.scoring.direction == "maximize" else scores.argmin()
        record = run.history[int(best)]
    result.metrics = {name: value for name, value in record.items() if name != "epoch"}
    result.epochs = int(record["epoch"]) + 1
    if run.pruned:
        result.status = Verdict.PRUNED
    elif not math.isfinite(record[primary]):
        result.status = Verdict.ERROR
        result.message = f"{primary} is {record[primary]}; expected a finite score from finite outputs"
    else:
        result.score = record[primary]
        reason = collapse(record, run.guess_loss, labels)
        if reason is not None:
            result.status, result.message = Verdict.COLLAPSED, reason
    return result


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "not enough memory" in str(error)
