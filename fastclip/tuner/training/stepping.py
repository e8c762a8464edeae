"""One training step: forward, backward, clip, look for an explosion, update."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from fastclip.tuner.training.batching import Part
from fastclip.tuner.training.explosion import ExplosionRule, ExplosionWatch
from fastclip.tuner.training.losses import LossFunction
from fastclip.tuner.training.optimisers import make_scheduler
from fastclip.tuner.training.precision import autocast, is_overflow
from fastclip.tuner.training.regularisation import penalty
from fastclip.tuner.training.updating import make_update

NORM_BINS_PER_DECADE = 10

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

    Reads from params: `lr`, `l1`, `l2`, `scheduler`, `amp`, and what `make_optimizer` and `Clipper` read.

    Args:
        model: Changed in place.
        params: Parameters of the trial.
        loss: Function of (outputs, targets) to train with, see `training_loss`.
        rule: When training counts as exploded.
        planned_steps: Steps of the whole run, for the schedule.
        reference: Loss that an explosion is measured from, see `ExplosionWatch`.
        device: Where the model is.
        search_clipped: Clip in the step of a `ClippedOptimizer`.

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
        *,
        device: torch.device,
        search_clipped: bool = False,
    ) -> None:
        self.model, self.loss = model, loss
        self.run = TrainingRun(planned_steps)
        self.update = make_update(model, params, device, search_clipped=search_clipped)
        self.scheduler = make_scheduler(self.update.optimizer, params.get("scheduler"), planned_steps)
        self.l1, self.l2 = float(params.get("l1", 0.0)), float(params.get("l2", 0.0))
        self._amp, self._device = params.get("amp"), device
        self.watch = ExplosionWatch(rule, reference)
        self.every = rule.every
        self._pending: list[tuple[torch.Tensor, bool]] = []
        self._losses: list[float] = []
        self._clipped: list[bool] = []
        self.norms: list[float] = []

    def step(self, parts: Iterable[Part]) -> None:
        """Train on the parts of a mini-batch; after an explosion no step is taken.

        The loss is the mean over all samples, if the loss of a part is the mean over its own. Outputs are
        float32 when they meet the loss, as when they are measured.
        """
        scaler = self.update.scaler
        self.update.optimizer.zero_grad(set_to_none=True)
        losses = []
        for inputs, targets, share in parts:
            with autocast(self._amp, self._device):
                outputs = call(self.model, inputs)
            loss = self.loss(outputs if self._amp is None else outputs.float(), targets)
            loss = loss if share == 1.0 else share * loss
            losses.append(loss.detach())
            self._backward(loss, scaler)
        regularised = penalty(self.model, self.l1, self.l2)
        if regularised is not None:
            self._backward(regularised, scaler)
        norm, clipped = self.update.clip()
        overflowed = is_overflow(scaler, norm)
        total = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
        told = torch.stack([value.to(total.device, torch.float64) for value in (total, norm, clipped)])
        self._pending.append((told, overflowed))
        if len(self._pending) >= self.every:
            self.flush()
        if self.run.explosion is None:
            self.update.finish()
            if self.scheduler is not None and not overflowed:
                self.scheduler.step()

    def _backward(self, loss: torch.Tensor, scaler: torch.amp.GradScaler | None) -> None:
        scaled = loss if scaler is None else scaler.scale(loss)
        scaled.backward()  # type: ignore[no-untyped-call]

    def flush(self) -> None:
        """Look at the steps since the last look: the one host synchronisation."""
        pending, self._pending = self._pending, []
        if not pending or self.run.explosion is not None:
            return
        told = torch.stack([numbers for numbers, _ in pending]).tolist()
        for (loss, norm, clipped), (_, overflowed) in zip(told, pending, strict=True):
            reason = self.watch.look(loss, None if overflowed else norm)
            if reason is not None:
                self.run.explosion = self._describe(reason, loss, norm)
                return
            self.run.steps += 1
            self._losses.append(loss)
            if overflowed:  # a norm of float16's range, which the scaler has left out
                continue
            self.norms.append(norm)
            self._clipped.append(bool(clipped))
            self.run.clipped_steps += bool(clipped)
            if norm > 0:
                key = math.floor(NORM_BINS_PER_DECADE * math.log10(norm))
                self.run.norm_counts[key] = self.run.norm_counts.get(key, 0) + 1

    def end_epoch(self) -> dict[str, float]:
        """Return the record of the epoch's training part and start the next."""
        losses, norms, clipped = self._losses, self.norms or [math.nan], self._clipped or [False]
        self._losses, self.norms, self._clipped = [], [], []
        return {
            "train_loss": float(np.mean(losses)),
            "lr": float(self.update.optimizer.param_groups[0]["lr"]),
            "grad_norm_median": float(np.median(norms)),
            "grad_norm_max": float(np.max(norms)),
            "clip_fraction": float(np.mean(clipped)),
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
