"""The training loop: one model, one training set, one watch for explosions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

import fastclip
from fastclip.tuner.data import TuningData
from fastclip.tuner.explosion import ExplosionRule, ExplosionWatch
from fastclip.tuner.metrics import LossFunction, Scoring, measure
from fastclip.tuner.optimisers import make_optimizer, make_scheduler
from fastclip.tuner.regularisation import penalty

DEFAULT_BATCH_SIZE = 32
EVALUATION_BATCH_SIZE = 512
NORM_BINS_PER_DECADE = 10

Indices = npt.NDArray[np.intp]
EpochRecord = dict[str, float]


@dataclass(frozen=True)
class StopRule:
    """When training ends: after max_epochs, `patience` epochs without a better score, or at a target."""

    max_epochs: int
    patience: int | None = None
    target: float | None = None

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.max_epochs < 1:
            raise ValueError(f"StopRule: max_epochs={self.max_epochs}; expected at least 1.")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"StopRule: patience={self.patience}; expected at least 1 epoch, or None.")


@dataclass(frozen=True)
class Objective:
    """What training minimises and measures, and when it ends: the same for every trial of a study."""

    loss: LossFunction
    scoring: Scoring
    stop: StopRule
    rule: ExplosionRule


@dataclass
class TrainingRun:
    """What one training run left behind.

    Attributes:
        history: One record per finished epoch: `epoch`, `train_loss`, `lr`, `grad_norm_median`,
            `grad_norm_max`, `clip_fraction`, and every held-out metric.
        steps: Optimizer steps taken.
        planned_steps: Steps that max_epochs would take.
        clipped_steps: Steps whose norm was above the threshold.
        norm_counts: Number of steps per tenth of a decade: key floor(10 * log10(norm)).
        explosion: Why training stopped as exploded, with the step, or None.
        pruned: Whether the epoch callback ended it.
        seconds: Wall time of training and of evaluation.
    """

    planned_steps: int
    history: list[EpochRecord] = field(default_factory=list)
    steps: int = 0
    clipped_steps: int = 0
    norm_counts: dict[int, int] = field(default_factory=dict)
    explosion: dict[str, Any] | None = None
    pruned: bool = False
    fit_seconds: float = 0.0
    score_seconds: float = 0.0

    @property
    def clip_fraction(self) -> float:
        """Share of the steps that were clipped."""
        return self.clipped_steps / self.steps if self.steps else 0.0


def clip(parameters: list[nn.Parameter], max_norm: float | None, norm_type: float) -> torch.Tensor:
    """Clip the gradients to max_norm and return their norm before; only measure it when max_norm is None."""
    return fastclip.clip_grad_norm_(parameters, math.inf if max_norm is None else max_norm, norm_type)


def train(
    model: nn.Module,
    data: TuningData,
    train_rows: Indices,
    test_rows: Indices,
    params: Mapping[str, Any],
    objective: Objective,
    *,
    seed: int,
    device: torch.device,
    on_epoch: Callable[[EpochRecord], bool] | None = None,
    on_step: Callable[[], None] | None = None,
) -> TrainingRun:
    """Train a model until its stop condition, an explosion, or the callback's word.

    Reads from params: `lr`, `max_norm`, `norm_type`, `optimizer`, `momentum`, `weight_decay`, `l1`, `l2`,
    `batch_size`, `scheduler`. The order of the mini-batches depends on the seed alone, so that folds are
    paired across trials.

    Args:
        model: On `device`, already initialised; changed in place. With `patience` it ends with the weights
            of its best epoch.
        data: All samples.
        train_rows: Indices of the samples to train on.
        test_rows: Indices of the samples to measure after each epoch.
        params: Parameters of the trial.
        objective: Loss, measures, stop rule and explosion rule.
        seed: Seed of the mini-batch order.
        device: Where the model is.
        on_epoch: Called with each epoch's record; True ends the run as pruned.
        on_step: Called after each step, as a sign of life.

    Returns:
        What happened. One host synchronisation every `objective.rule.every` steps.
    """
    batch_size = _check_batch_size(params.get("batch_size", DEFAULT_BATCH_SIZE))
    batches = _num_batches(len(train_rows), batch_size)
    run = TrainingRun(planned_steps=batches * objective.stop.max_epochs)
    optimizer = make_optimizer(model, params)
    stepper = _Stepper(model, optimizer, params, objective, run, run.planned_steps)
    order = np.random.default_rng(seed)
    best = _BestEpoch(objective)
    for epoch in range(objective.stop.max_epochs):
        started = perf_counter()
        model.train()
        for rows in _mini_batches(order.permutation(train_rows), batch_size, batches):
            stepper.step(*data.batch(rows, device))
            if on_step is not None:
                on_step()
            if run.explosion is not None:
                break
        stepper.flush()
        run.fit_seconds += perf_counter() - started
        if run.explosion is not None:
            break
        started = perf_counter()
        record = {
            "epoch": float(epoch),
            **stepper.end_epoch(),
            **evaluate(model, data, test_rows, objective, device),
        }
        run.score_seconds += perf_counter() - started
        if not math.isfinite(record["loss"]):
            run.explosion = {
                "reason": f"the held-out loss is {record['loss']}",
                "step": run.steps,
                "epoch": epoch,
            }
            break
        run.history.append(record)
        if on_epoch is not None and on_epoch(record):
            run.pruned = True
            break
        if best.is_time_to_stop(record, model):
            break
    best.restore(model)
    return run


@torch.no_grad()
def evaluate(
    model: nn.Module, data: TuningData, rows: Indices, objective: Objective, device: torch.device
) -> dict[str, float]:
    """Return every metric of a model on these samples."""
    outputs = predict(model, data, rows, device)
    return measure(
        outputs, data.targets[torch.from_numpy(rows)], objective.loss, objective.scoring, data.classes
    )


@torch.no_grad()
def predict(model: nn.Module, data: TuningData, rows: Indices, device: torch.device) -> torch.Tensor:
    """Return the outputs of a model on these samples, on the CPU in float32."""
    model.eval()
    parts = [
        call(model, data.batch(rows[i : i + EVALUATION_BATCH_SIZE], device)[0]).float().cpu()
        for i in range(0, len(rows), EVALUATION_BATCH_SIZE)
    ]
    return torch.cat(parts)


def call(model: nn.Module, inputs: Any) -> torch.Tensor:
    """Run a model on a tensor, a tuple of arguments or a dict of keyword arguments."""
    if isinstance(inputs, tuple):
        return model(*inputs)  # type: ignore[no-any-return]
    if isinstance(inputs, dict):
        return model(**inputs)  # type: ignore[no-any-return]
    return model(inputs)  # type: ignore[no-any-return]


class _Stepper:
    """Forward, backward, clip and update of one mini-batch, and the record of the epoch."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        params: Mapping[str, Any],
        objective: Objective,
        run: TrainingRun,
        total_steps: int,
    ) -> None:
        self.model, self.optimizer, self.run = model, optimizer, run
        self.scheduler = make_scheduler(optimizer, params.get("scheduler"), total_steps)
        self.loss = objective.loss
        self.max_norm = None if params.get("max_norm") is None else float(params["max_norm"])
        self.norm_type = float(params.get("norm_type", 2.0))
        self.l1, self.l2 = float(params.get("l1", 0.0)), float(params.get("l2", 0.0))
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.watch = ExplosionWatch(objective.rule)
        self.every = objective.rule.every
        self._pending: list[torch.Tensor] = []
        self._losses: list[float] = []
        self._norms: list[float] = []

    def step(self, inputs: Any, targets: torch.Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(call(self.model, inputs), targets)
        regularised = penalty(self.model, self.l1, self.l2)
        (loss if regularised is None else loss + regularised).backward()  # type: ignore[no-untyped-call]
        norm = clip(self.parameters, self.max_norm, self.norm_type)
        self._pending.append(torch.stack((loss.detach().double(), norm.to(loss.device).double())))
        if len(self._pending) >= self.every:
            self.flush()
        if self.run.explosion is None:
            self.optimizer.step()
            if self.scheduler is not None:
                self.scheduler.step()

    def flush(self) -> None:
        """Look at the steps since the last look: the one host synchronisation."""
        pending, self._pending = self._pending, []
        if not pending or self.run.explosion is not None:
            return
        for loss, norm in torch.stack(pending).tolist():
            reason = self.watch.look(loss, norm)
            if reason is not None:
                self.run.explosion = self._describe(reason, loss, norm)
                return
            self.run.steps += 1
            self._losses.append(loss)
            self._norms.append(norm)
            self.run.clipped_steps += self.max_norm is not None and norm > self.max_norm
            if norm > 0:
                key = math.floor(NORM_BINS_PER_DECADE * math.log10(norm))
                self.run.norm_counts[key] = self.run.norm_counts.get(key, 0) + 1

    def end_epoch(self) -> dict[str, float]:
        """Return the record of the epoch's training part and start the next."""
        losses, norms = np.asarray(self._losses), np.asarray(self._norms)
        self._losses, self._norms = [], []
        return {
            "train_loss": float(losses.mean()),
            "lr": float(self.optimizer.param_groups[0]["lr"]),
            "grad_norm_median": float(np.median(norms)),
            "grad_norm_max": float(norms.max()),
            "clip_fraction": 0.0 if self.max_norm is None else float((norms > self.max_norm).mean()),
        }

    def _describe(self, reason: str, loss: float, norm: float) -> dict[str, Any]:
        norms = self._norms[-self.watch.rule.window :]
        return {
            "reason": reason,
            "step": self.run.steps,
            "epoch": len(self.run.history),
            "loss": loss,
            "norm": norm,
            "norm_median": float(np.median(norms)) if norms else None,
        }


class _BestEpoch:
    """Decides when to stop and keeps the weights of the best epoch when patience asks for them."""

    def __init__(self, objective: Objective) -> None:
        self.stop, self.scoring = objective.stop, objective.scoring
        self._score = self.scoring.worst
        self._epoch = -1.0
        self._weights: dict[str, torch.Tensor] | None = None

    def is_time_to_stop(self, record: EpochRecord, model: nn.Module) -> bool:
        score = record[self.scoring.primary]
        if self.stop.patience is not None and (
            self._weights is None or self.scoring.is_better(score, self._score)
        ):
            self._score, self._epoch = score, record["epoch"]
            self._weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
        if self.stop.target is not None and not self.scoring.is_better(self.stop.target, score):
            return True
        return self.stop.patience is not None and record["epoch"] - self._epoch >= self.stop.patience

    def restore(self, model: nn.Module) -> None:
        if self._weights is not None:
            model.load_state_dict(self._weights)


def _check_batch_size(batch_size: Any) -> int:
    if isinstance(batch_size, bool) or int(batch_size) != batch_size or batch_size < 1:
        raise ValueError(f"train: batch_size={batch_size!r}; expected a whole number of at least 1.")
    return int(batch_size)


def _num_batches(num_rows: int, batch_size: int) -> int:
    """Return the mini-batches of an epoch; a last one of a single sample joins the one before it.

    Batch normalisation cannot train on one sample.
    """
    full, rest = divmod(num_rows, batch_size)
    return max(1, full + (rest > 1))


def _mini_batches(rows: Indices, batch_size: int, count: int) -> Iterator[Indices]:
    for i in range(count):
        yield rows[i * batch_size :] if i == count - 1 else rows[i * batch_size : (i + 1) * batch_size]
