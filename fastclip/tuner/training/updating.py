"""The update of a training step: clip and then step, or both at once in a `ClippedOptimizer`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import fastclip
from fastclip.strategies import Strategy
from fastclip.tuner.training.clipping import Clipper, make_strategy
from fastclip.tuner.training.optimisers import make_optimizer
from fastclip.tuner.training.precision import make_scaler


class Update(Protocol):
    """What happens between the backward pass and the next step."""

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Whose rates a schedule sets."""

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """Of the loss, for float16; else None."""

    def clip(self) -> tuple[Tensor, Tensor]:
        """Clip; return the norm before, of gradients that are no longer scaled, and whether it acted."""

    def finish(self) -> None:
        """Do what is left of the step, unless training ended with the look at its norm."""


class ClipThenStep:
    """`clip_grad_norm_`, or a strategy, and then the optimizer's step."""

    def __init__(self, model: nn.Module, params: Mapping[str, Any], device: torch.device) -> None:
        self.optimizer = make_optimizer(model, params)
        self.scaler = make_scaler(params.get("amp"), device, torch.amp.GradScaler)
        self._clipper = Clipper(params, [p for p in model.parameters() if p.requires_grad])
        self._is_outlier = False
        for i, group in enumerate(self.optimizer.param_groups):
            if "max_norm" in group:
                raise ValueError(
                    f"ClipThenStep: group {i} of param_groups has a max_norm of its own, which is "
                    "ClippedOptimizer's to read; expected search_clipped=True."
                )

    def clip(self) -> tuple[Tensor, Tensor]:
        """Unscale the gradients and clip them."""
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        norm, clipped, self._is_outlier = self._clipper.clip()
        return norm, clipped

    def finish(self) -> None:
        """Step, unless a strategy or the scaler leaves the step out."""
        if self.scaler is None:
            if not self._is_outlier:
                self.optimizer.step()
            return
        if not self._is_outlier:
            self.scaler.step(self.optimizer)
        self.scaler.update()


class ClippedStep:
    """The step of a `ClippedOptimizer`, which leaves out what is not finite.

    An explosion is seen after the step, and training ends all the same.
    """

    def __init__(self, model: nn.Module, params: Mapping[str, Any], device: torch.device) -> None:
        strategy, limit = make_strategy(params), params.get("max_norm")
        self._limit: float | Strategy = strategy or (math.inf if limit is None else float(limit))
        self.optimizer = fastclip.ClippedOptimizer(
            make_optimizer(model, params), self._limit, norm_type=float(params.get("norm_type", 2.0))
        )
        self._has_own_limits = any("max_norm" in group for group in self.optimizer.param_groups)
        self.scaler = make_scaler(params.get("amp"), device, fastclip.GradScaler)

    def clip(self) -> tuple[Tensor, Tensor]:
        """Clip and step."""
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
        outcome = self.optimizer.last
        if outcome is None:
            raise RuntimeError("fastclip bug: a step of ClippedOptimizer has no outcome.")
        norm = outcome.total_norm
        if isinstance(self._limit, Strategy) or self._has_own_limits:
            return norm, outcome.clip_coef < 1
        return norm, norm > self._limit

    def finish(self) -> None:
        """Let the scaler learn of the step."""
        if self.scaler is not None:
            self.scaler.update()


def make_update(
    model: nn.Module, params: Mapping[str, Any], device: torch.device, *, search_clipped: bool
) -> Update:
    """Return the update of a training: that of `ClippedOptimizer` for search_clipped."""
    if search_clipped:
        return ClippedStep(model, params, device)
    return ClipThenStep(model, params, device)
