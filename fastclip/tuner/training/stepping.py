"""One training step: forward, backward, clip, look for an explosion, update."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fastclip.tuner.training.clipping import Clipper
from fastclip.tuner.training.data import TuningData
from fastclip.tuner.training.explosion import ExplosionRule, ExplosionWatch
from fastclip.tuner.training.losses import LossFunction
from fastclip.tuner.training.optimisers import make_optimizer, make_scheduler
from fastclip.tuner.training.regularisation import penalty

DEFAULT_BATCH_SIZE = 32
NORM_BINS_PER_DECADE = 10

Indices = npt.NDArray[np.intp]
EpochRecord = dict[str, float]


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
        is_out_of_time: Whether the deadline ended it.
        confusion: Confusion matrix of the epoch that counts, or None, see `measure_batches`.
        guess_loss: Held-out loss of guessing, or None when it is not known.
        fit_seconds: Wall time of training.
        score_seconds: Wall time of evaluation.
    """

    planned_steps: int
    history: list[EpochRecord] = field(default_factory=list)
    steps: int = 0
    clipped_steps: int = 0
    norm_counts: dict[int, int] = field(default_factory=dict)
    explosion: dict[str, Any] | None = None
    pruned: bool = False
    is_out_of_time: bool = False
    confusion: list[list[int]] | None = None
    guess_loss: float | None = None
    fit_seconds: float = 0.0
    score_seconds: float = 0.0

    @property
    def clip_fraction(self) -> float:
        """Share of the steps that were clipped."""
        return self.clipped_steps / self.steps if self.steps else 0.0


def call(model: nn.Module, inputs: Any) -> torch.Tensor:
    """Run a model on a tensor, a tuple of arguments or a dict of keyword arguments."""
    if type(inputs) is tuple:  # a packed sequence is one argument
        return model(*inputs)  # type: ignore[no-any-return]
    if isinstance(inputs, Mapping):
        return model(**inputs)  # type: ignore[no-any-return]
    return model(inputs)  # type: ignore[no-any-return]


class Stepper:
    """Takes the steps of one training run and keeps its record.

    Reads from params: `lr`, `l1`, `l2`, `scheduler`, `optimizer` and its arguments, and what `Clipper` reads.

    Args:
        model: Changed in place.
        params: Parameters of the trial.
        loss: Function of (outputs, targets) to train with, see `training_loss`.
        rule: When training counts as exploded.
        planned_steps: Steps of the whole run, for the schedule.
        reference: Loss that an explosion is measured from, see `ExplosionWatch`.

    Attributes:
        run: The record.
        norms: Gradient norms before clipping since the last `end_epoch`.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Mapping[str, Any],
        loss: LossFunction,
        rule: ExplosionRule,
        planned_steps: int,
        reference: float | None = None,
    ) -> None:
        self.model, self.loss = model, loss
        self.run = TrainingRun(planned_steps)
        self.optimizer = make_optimizer(model, params)
        self.scheduler = make_scheduler(self.optimizer, params.get("scheduler"), planned_steps)
        self.l1, self.l2 = float(params.get("l1", 0.0)), float(params.get("l2", 0.0))
        self.clipper = Clipper(params, [p for p in model.parameters() if p.requires_grad])
        self.watch = ExplosionWatch(rule, reference)
        self.every = rule.every
        self._pending: list[torch.Tensor] = []
        self._losses: list[float] = []
        self._clipped: list[bool] = []
        self.norms: list[float] = []

    def step(self, inputs: Any, targets: torch.Tensor) -> None:
        """Train on one mini-batch; after an explosion the weights stay as they are."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(call(self.model, inputs), targets)
        regularised = penalty(self.model, self.l1, self.l2)
        (loss if regularised is None else loss + regularised).backward()  # type: ignore[no-untyped-call]
        norm, clipped, is_outlier = self.clipper.clip()
        told = (loss.detach(), norm, clipped)
        self._pending.append(torch.stack([value.to(loss.device, torch.float64) for value in told]))
        if len(self._pending) >= self.every:
            self.flush()
        if self.run.explosion is None:
            if not is_outlier:
                self.optimizer.step()
            if self.scheduler is not None:
                self.scheduler.step()

    def flush(self) -> None:
        """Look at the steps since the last look: the one host synchronisation."""
        pending, self._pending = self._pending, []
        if not pending or self.run.explosion is not None:
            return
        for loss, norm, clipped in torch.stack(pending).tolist():
            reason = self.watch.look(loss, norm)
            if reason is not None:
                self.run.explosion = self._describe(reason, loss, norm)
                return
            self.run.steps += 1
            self._losses.append(loss)
            self.norms.append(norm)
            self._clipped.append(bool(clipped))
            self.run.clipped_steps += bool(clipped)
            if norm > 0:
                key = math.floor(NORM_BINS_PER_DECADE * math.log10(norm))
                self.run.norm_counts[key] = self.run.norm_counts.get(key, 0) + 1

    def end_epoch(self) -> dict[str, float]:
        """Return the record of the epoch's training part and start the next."""
        losses, norms, clipped = np.asarray(self._losses), np.asarray(self.norms), np.asarray(self._clipped)
        self._losses, self.norms, self._clipped = [], [], []
        return {
            "train_loss": float(losses.mean()),
            "lr": float(self.optimizer.param_groups[0]["lr"]),
            "grad_norm_median": float(np.median(norms)),
            "grad_norm_max": float(norms.max()),
            "clip_fraction": float(clipped.mean()),
        }

    def _describe(self, reason: str, loss: float, norm: float) -> dict[str, Any]:
        norms = self.norms[-self.watch.rule.window :]
        return {
            "reason": reason,
            "step": self.run.steps,
            "epoch": len(self.run.history),
            "loss": loss,
            "norm": norm,
            "norm_median": float(np.median(norms)) if norms else None,
        }


def batch_size_of(params: Mapping[str, Any], data: TuningData) -> int:
    """Return the samples of a mini-batch: the parameter, or what a DataLoader said, or the default."""
    return check_batch_size(params.get("batch_size", data.loading.batch_size or DEFAULT_BATCH_SIZE))


def check_batch_size(batch_size: Any) -> int:
    """Return batch_size as an int; raise ValueError unless it is a whole number of at least 1."""
    if isinstance(batch_size, bool) or int(batch_size) != batch_size or batch_size < 1:
        raise ValueError(
            f"check_batch_size: batch_size={batch_size!r}; expected a whole number of at least 1."
        )
    return int(batch_size)


def num_batches(num_rows: int, batch_size: int) -> int:
    """Return the mini-batches of an epoch; a last one of a single sample joins the one before it.

    Batch normalisation cannot train on one sample.
    """
    full, rest = divmod(num_rows, batch_size)
    return max(1, full + (rest > 1))


def mini_batches(rows: Indices, batch_size: int) -> Iterator[Indices]:
    """Yield the rows of each mini-batch."""
    count = num_batches(len(rows), batch_size)
    for i in range(count):
        yield rows[i * batch_size :] if i == count - 1 else rows[i * batch_size : (i + 1) * batch_size]
