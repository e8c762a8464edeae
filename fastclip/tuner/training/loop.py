"""The training loop: epochs of steps, each followed by a look at the held-out samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter, time
from typing import Any

import numpy as np
import torch
from torch import nn

from fastclip.tuner.training.batching import Indices, num_steps, steps
from fastclip.tuner.training.data import TuningData
from fastclip.tuner.training.explosion import ExplosionRule
from fastclip.tuner.training.guessing import guess_loss, untrained_loss
from fastclip.tuner.training.losses import LossFunction, training_loss
from fastclip.tuner.training.metrics import Batch, measure_batches
from fastclip.tuner.training.precision import autocast
from fastclip.tuner.training.scoring import Scoring
from fastclip.tuner.training.seeding import seeded
from fastclip.tuner.training.stepping import EpochRecord, Stepper, TrainingRun, call

EVALUATION_BATCH_SIZE = 512


@dataclass(frozen=True)
class StopRule:
    """When training ends: after max_epochs, `patience` epochs without a better score, or at a target.

    With `end_after` it ends after so many epochs, while a schedule is that of max_epochs.
    """

    max_epochs: int
    patience: int | None = None
    target: float | None = None
    end_after: int | None = None

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
    search_clipped: bool = False


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
    deadline: float | None = None,
) -> TrainingRun:
    """Train a model until its stop condition, an explosion, or the callback's word.

    Reads `batch_size` and `accumulate` from params, and what `training_loss` and `Stepper` read. The order of
    the mini-batches depends on the seed alone, so that folds are paired across trials.

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
        deadline: Time since the epoch, in seconds, after which no further step is taken.

    Returns:
        What happened. One host synchronisation every `objective.rule.every` steps.
    """
    trained = training_loss(objective.loss, params, data, train_rows)
    planned_steps = num_steps(len(train_rows), params, data) * objective.stop.max_epochs
    amp = params.get("amp")
    reference, shape = untrained_loss(model, data, train_rows, objective.loss, device, amp)
    stepper = Stepper(
        model,
        params,
        trained,
        objective.rule,
        planned_steps,
        None if math.isnan(reference) else reference,
        device=device,
        search_clipped=objective.search_clipped,
    )
    run = stepper.run
    run.guess_loss = guess_loss(shape, data, train_rows, test_rows, objective.loss)
    order = np.random.default_rng(seed)
    best = _BestEpoch(objective)
    for epoch in range(objective.stop.end_after or objective.stop.max_epochs):
        started = perf_counter()
        model.train()
        for parts in steps(data, order.permutation(train_rows), params, device):
            stepper.step(parts)
            if on_step is not None:
                on_step()
            run.is_out_of_time = deadline is not None and time() >= deadline
            if run.explosion is not None or run.is_out_of_time:
                break
        stepper.flush()
        run.fit_seconds += perf_counter() - started
        if run.explosion is not None or run.is_out_of_time:
            break
        started = perf_counter()
        trained_part = stepper.end_epoch()
        measures, confusion = evaluate(model, data, test_rows, objective, device, amp)
        record = {"epoch": float(epoch), **trained_part, **measures}
        run.score_seconds += perf_counter() - started
        reason = stepper.watch.look_at_epoch(record["train_loss"], record["loss"])
        if reason is not None:
            run.explosion = {
                "reason": reason,
                "step": run.steps,
                "epoch": epoch,
                "loss": record["loss"],
                "norm": record["grad_norm_max"],
                "norm_median": record["grad_norm_median"],
            }
            break
        run.history.append(record)
        if best.counts(record):
            run.confusion = confusion
        if on_epoch is not None and on_epoch(record):
            run.pruned = True
            break
        if best.is_time_to_stop(record, model):
            break
    best.restore(model)
    return run


def evaluate(
    model: nn.Module,
    data: TuningData,
    rows: Indices,
    objective: Objective,
    device: torch.device,
    amp: str | None = None,
) -> tuple[dict[str, float], list[list[int]] | None]:
    """Return every metric of a model on these samples, and the confusion matrix; see `measure_batches`."""
    batches = run_batches(model, data, rows, device, amp)
    if len({(outputs.shape[1:], targets.shape[1:]) for outputs, targets in batches}) == 1:
        outputs, targets = zip(*batches, strict=True)
        batches = [(torch.cat(outputs), torch.cat(targets))]
    ignore_index = data.ignore_index if data.has_ignored else None
    return measure_batches(
        batches, objective.loss, objective.scoring, data.classes, data.class_names, ignore_index
    )


def predict(
    model: nn.Module, data: TuningData, rows: Indices, device: torch.device, amp: str | None = None
) -> torch.Tensor:
    """Return the outputs of a model on these samples, on the CPU in float32.

    Raises:
        ValueError: sequences of different length make outputs of different shapes.
    """
    parts = [outputs for outputs, _ in run_batches(model, data, rows, device, amp)]
    shapes = {tuple(part.shape[1:]) for part in parts}
    if len(shapes) > 1:
        raise ValueError(
            f"predict: the outputs of single samples have the shapes {', '.join(map(str, sorted(shapes)))}; "
            "expected one. Call best_estimator_ batch by batch."
        )
    return torch.cat(parts)


@torch.no_grad()
def run_batches(
    model: nn.Module, data: TuningData, rows: Indices, device: torch.device, amp: str | None = None
) -> list[Batch]:
    """Return outputs in float32 and targets, batch by batch and on the CPU, of a model that is measured.

    The model is called in the precision that `amp` names, as in training.
    The same samples give the same batches every time, whatever randomness reads them, and the randomness of
    training goes on as if nothing had been measured.
    """
    model.eval()
    starts = range(0, len(rows), EVALUATION_BATCH_SIZE)
    parts = [rows[start : start + EVALUATION_BATCH_SIZE] for start in starts]
    with seeded(0, device), autocast(amp, device):
        return [
            (call(model, inputs).float().cpu(), targets.cpu())
            for inputs, targets in data.batches(parts, device, measured=True)
        ]


class _BestEpoch:
    """Decides when to stop and keeps the weights of the best epoch when patience asks for them."""

    def __init__(self, objective: Objective) -> None:
        self.stop, self.scoring = objective.stop, objective.scoring
        self._score = self.scoring.worst
        self._epoch = -1.0
        self._weights: dict[str, torch.Tensor] | None = None

    def counts(self, record: EpochRecord) -> bool:
        """Return whether an epoch counts until a better one comes."""
        is_better = self.scoring.is_better(record[self.scoring.primary], self._score)
        return self.stop.patience is None or self._weights is None or is_better

    def is_time_to_stop(self, record: EpochRecord, model: nn.Module) -> bool:
        score = record[self.scoring.primary]
        if self.stop.patience is not None and self.counts(record):
            self._score, self._epoch = score, record["epoch"]
            self._weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
        if self.stop.target is not None and not self.scoring.is_better(self.stop.target, score):
            return True
        return self.stop.patience is not None and record["epoch"] - self._epoch >= self.stop.patience

    def restore(self, model: nn.Module) -> None:
        if self._weights is not None:
            model.load_state_dict(self._weights)
