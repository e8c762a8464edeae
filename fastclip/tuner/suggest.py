"""Suggest a clipping threshold from the gradient norms of a short unclipped warm-up."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastclip.tuner.errors import WarmupExplodedError
from fastclip.tuner.executors.base import device_slots
from fastclip.tuner.study.probing import probe
from fastclip.tuner.study.spaces import Float, Space
from fastclip.tuner.training.batching import steps
from fastclip.tuner.training.checking import check_values
from fastclip.tuner.training.data import TuningData
from fastclip.tuner.training.explosion import ExplosionRule
from fastclip.tuner.training.folds import ModelInit, build_model, torch_threads
from fastclip.tuner.training.guessing import untrained_loss
from fastclip.tuner.training.losses import (
    LossFunction,
    has_label_parameters,
    prepare_loss,
    training_loss,
    with_meaning_of,
)
from fastclip.tuner.training.optimisers import DEFAULT_LR
from fastclip.tuner.training.parameters import KNOWN
from fastclip.tuner.training.reading import as_data
from fastclip.tuner.training.seeding import derive_seed, seeded
from fastclip.tuner.training.stepping import Stepper

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
LOW_SHARE_OF_MEDIAN = 0.1
RATE_STEP = 10.0
MAX_PROBES = 4


@dataclass(frozen=True)
class ClipRange:
    """What `suggest_clip_range` found.

    Attributes:
        max_norm: The suggested threshold: the median norm, which clips about half of the steps.
        low: Lower end of the range to search: a tenth of the median.
        high: Upper end: the 99 % quantile, above which clipping hardly acts.
        quantiles: Quantile -> gradient norm.
        lr: Rate of the warm-up.
        steps: Steps of the warm-up.
    """

    max_norm: float
    low: float
    high: float
    quantiles: dict[float, float]
    lr: float
    steps: int

    @property
    def dimension(self) -> Float:
        """The range as a search dimension for `max_norm`."""
        return Float(self.low, self.high, log=True)


def suggest_clip_range(
    model_init: ModelInit,
    data: Any,
    y: Any = None,
    *,
    params: Mapping[str, Any] | None = None,
    steps: int = 200,
    seed: int = 0,
    loss: LossFunction | None = None,
    explosion: ExplosionRule | None = None,
    devices: Sequence[Any] | None = None,
    threads: int | None = 1,
) -> ClipRange:
    """Train for a few steps without clipping and suggest a threshold from the norms.

    Args:
        model_init: Function of the dict of parameters that returns a new torch module.
        data: torch Dataset, a pair (X, y), or X.
        y: Targets for X.
        params: Parameters of the training loop, such as `lr`; `max_norm` is ignored.
        steps: Steps of the warm-up.
        seed: Seed of the model and of the mini-batches.
        loss: Function of (outputs, targets).
        explosion: When the warm-up counts as exploded.
        devices: Where to train; the first is taken.
        threads: torch's threads.

    Returns:
        Threshold, search range and quantiles.

    Raises:
        WarmupExplodedError: the warm-up exploded, so its norms say nothing about healthy training; the
            message names a rate, found by trying, at which it stays finite.
        ValueError: steps < 1, all norms are zero, or nobody reads a parameter.

    Source:
        Pascanu, Mikolov and Bengio, On the difficulty of training recurrent neural networks, 2013: thresholds
        from half to ten times the average norm trained alike.
    """
    if steps < 1:
        raise ValueError(f"suggest_clip_range: steps={steps}; expected at least 1.")
    view = as_data(data, y, caller="suggest_clip_range")
    measured = prepare_loss(loss)
    view = with_meaning_of(measured, view)
    check_values(view, "suggest_clip_range")
    chosen = {"lr": DEFAULT_LR, **(params or {}), "max_norm": None}
    probe(
        model_init,
        Space(chosen),
        seed=seed,
        label_parameters_act=has_label_parameters(measured, view),
        caller="suggest_clip_range",
        may_rest=KNOWN,
    )
    warm_up = _WarmUp(
        model_init,
        view,
        steps,
        derive_seed(seed, 0),
        measured,
        ExplosionRule() if explosion is None else explosion,
        device_slots(devices, 1)[0],
    )
    with torch_threads(threads):
        stepper = warm_up.run(chosen)
        if stepper.run.explosion is not None:
            raise _refusal(warm_up, chosen, stepper)
    norms = np.asarray(stepper.norms)
    quantiles = {q: float(np.quantile(norms, q)) for q in QUANTILES}
    if quantiles[0.5] == 0.0:
        raise ValueError(
            "suggest_clip_range: most gradient norms are 0; expected a model that learns at this point."
        )
    low = LOW_SHARE_OF_MEDIAN * quantiles[0.5]
    return ClipRange(quantiles[0.5], low, quantiles[0.99], quantiles, chosen["lr"], steps)


@dataclass(frozen=True)
class _WarmUp:
    """A training run of a fixed number of steps."""

    model_init: ModelInit
    data: TuningData
    steps: int
    seed: int
    loss: LossFunction
    rule: ExplosionRule
    device: torch.device

    def run(self, params: dict[str, Any]) -> Stepper:
        rows = np.arange(len(self.data))
        order = np.random.default_rng(self.seed)
        with seeded(self.seed, self.device):
            model = build_model(self.model_init, self.data, params, rows, self.device)
            reference = untrained_loss(model, self.data, rows, self.loss, self.device, params.get("amp"))[0]
            known = None if math.isnan(reference) else reference
            loss = training_loss(self.loss, params, self.data, rows)
            stepper = Stepper(model.train(), params, loss, self.rule, self.steps, known, device=self.device)
            taken = 0
            while taken < self.steps and stepper.run.explosion is None:
                left = self.steps - taken
                for parts in steps(self.data, order.permutation(rows), params, self.device, left):
                    taken += 1
                    if stepper.run.explosion is None:
                        stepper.step(parts)
            stepper.flush()
        return stepper


def _refusal(warm_up: _WarmUp, params: dict[str, Any], exploded: Stepper) -> WarmupExplodedError:
    """Look for a lower rate at which the warm-up stays finite."""
    explosion = exploded.run.explosion or {}
    found = (
        f"suggest_clip_range: the warm-up at lr={params['lr']:.3g} exploded at step {explosion['step']}: "
        f"{explosion['reason']}; expected {warm_up.steps} finite steps."
    )
    for attempt in range(1, MAX_PROBES + 1):
        lr = params["lr"] / RATE_STEP**attempt
        if warm_up.run({**params, "lr": lr}).run.explosion is None:
            return WarmupExplodedError(f"{found} It stays finite at lr={lr:.3g}: try again at that rate.", lr)
    return WarmupExplodedError(
        f"{found} It explodes down to lr={lr:.3g} too, so the rate is not the cause: look at init, init_gain "
        "and the scale of the data.",
        None,
    )
