"""What is decided before a step is taken: where ranks reduce, where a strategy asks for the norm first.

Else it is decided on the way: the kernels that measure also clip, by a threshold that they are given.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastclip.backends.eager import clip_coefficient, combined, returned_dtype, wide_dtype
from fastclip.distributed import Shards
from fastclip.optim.gradients import Decided, dense_values, over_ranks, over_ranks_of, parameters
from fastclip.optim.outcome import NO_GRADIENTS, Outcome
from fastclip.optim.settings import Amp, MaxNorm, Settings, checked_max_norm
from fastclip.strategies import Decision, Global, Gradients, Strategy
from fastclip.strategies.base import measured
from fastclip.strategies.within import Within

GROUP_KEY = "max_norm"
"""Of a parameter group: the threshold of its own, for the norm of its own gradients."""


@dataclass(frozen=True)
class Clipper:
    """A threshold and the parameters that it is for."""

    max_norm: MaxNorm
    params: list[Tensor]
    names: list[str] | None

    def present(self) -> tuple[list[Tensor], list[str] | None, list[int]]:
        """Return the parameters that have a gradient, their names and their places."""
        at = [i for i, param in enumerate(self.params) if param.grad is not None]
        names = None if self.names is None else [self.names[i] for i in at]
        return [self.params[i] for i in at], names, at


def clippers(function: str, optimizer: Optimizer, settings: Settings) -> list[Clipper]:
    """Return all thresholds of an optimizer; that of the settings, for groups without their own, last."""
    own = [group for group in optimizer.param_groups if GROUP_KEY in group]
    rest = [group for group in optimizer.param_groups if GROUP_KEY not in group]
    found = [
        Clipper(checked_max_norm(function, group[GROUP_KEY]), group["params"], group.get("param_names"))
        for group in own
    ]
    if rest or not found:
        params = [param for group in rest for param in group["params"]]
        named = all("param_names" in group for group in rest)
        names = [name for group in rest for name in group["param_names"]] if named else None
        found.append(Clipper(settings.max_norm, params, names))
    strategies = [id(clipper.max_norm) for clipper in found if isinstance(clipper.max_norm, Strategy)]
    if len(set(strategies)) < len(strategies):
        raise ValueError(
            f"{function}: two parameter groups share one strategy, which would take the norms of both for "
            f"those of one; expected one for each, such as a copy.deepcopy."
        )
    return found


def strategies_of(optimizer: Optimizer, settings: Settings) -> Iterator[tuple[str, Strategy]]:
    """Yield the strategies at work and the names under which a checkpoint has them; each object once."""
    seen: set[int] = set()
    named = [("default", settings.max_norm)]
    named += [(str(i), g.get(GROUP_KEY, math.inf)) for i, g in enumerate(optimizer.param_groups)]
    for name, limit in named:
        if isinstance(limit, Strategy) and id(limit) not in seen:
            seen.add(id(limit))
            yield name, limit


def decide(
    function: str, optimizer: Optimizer, settings: Settings, amp: Amp
) -> tuple[Settings, Decided | None]:
    """Ask the strategies, after measuring and reducing where that comes first.

    Returns:
        The settings, with a number or a tensor in the place of a strategy, and what is decided already; None
        if the step itself is to measure. No gradient is touched, but where a strategy clips within gradients
        and the kernels do not.
    """
    whole = over_ranks(function, optimizer, settings)
    is_one = not any(GROUP_KEY in group for group in optimizer.param_groups)
    if whole is None and is_one:
        if not isinstance(settings.max_norm, Strategy):
            return settings, None
        if (foreseen := _foreseen(function, optimizer, settings)) is not None:
            return foreseen, None
    every = clippers(function, optimizer, settings)
    found = [
        _measured(function, clipper, settings, amp, whole if len(every) == 1 else None) for clipper in every
    ]
    outcome, coefs, within, may_skip = _decided(found, settings, amp, optimizer)
    dtype = torch.float32
    if whole is not None:
        dtype = whole.plan.dtype
    elif any(m.is_float64 for m in found):
        dtype = torch.float64
    outcome = Outcome(
        outcome.total_norm.to(dtype), outcome.clip_coef.to(dtype), outcome.skipped, outcome.threshold
    )
    return replace(settings, max_norm=math.inf), Decided(outcome, coefs, may_skip, whole, within)


def learn(settings: Settings, now: Settings, outcome: Outcome) -> None:
    """Let a strategy that predicted see the norm of the step, and keep the threshold with the outcome."""
    strategy = settings.max_norm
    if not isinstance(strategy, Global) or outcome is NO_GRADIENTS:
        return
    outcome.threshold = now.max_norm if not isinstance(now.max_norm, Strategy) else None
    if (numbers := outcome.numbers()) is not None:
        norm = math.nan if numbers[2] else numbers[0]
        strategy.learn(torch.tensor(norm, dtype=torch.float64, device="cpu"))
    else:
        strategy.learn(outcome.total_norm, outcome.skipped)


def _foreseen(function: str, optimizer: Optimizer, settings: Settings) -> Settings | None:
    """Return how to clip where the strategy knows it before the norm is known, or has nothing to clip."""
    strategy = settings.max_norm
    of_all = (p.grad for group in optimizer.param_groups for p in group["params"])
    grad = next((grad for grad in of_all if grad is not None), None)
    if grad is None:
        return replace(settings, max_norm=math.inf)
    if isinstance(strategy, Global) and strategy.predicts:
        # A copy: the state that it stands in changes when the step is learned from.
        limit = strategy.threshold(torch.empty((), dtype=wide_dtype(grad), device=grad.device)).clone()
        return replace(settings, max_norm=limit)
    assert isinstance(strategy, Strategy)  # else nobody asks
    (clipper,) = clippers(function, optimizer, settings)
    present, names, _ = clipper.present()
    within = strategy.within(present, names)
    if within is None or not within.folds(present):
        return None
    return replace(settings, max_norm=math.inf, within=within)


@dataclass(frozen=True)
class _Measured:
    """The gradients of a clipper, and what is known of them.

    Attributes:
        max_norm: Of the clipper.
        gradients: Its own.
        found: How often a scaler found inf, on the ranks that reduced; None if none looked.
        is_float64: Whether their norm is returned in float64.
    """

    max_norm: MaxNorm
    gradients: Gradients
    found: Tensor | None
    is_float64: bool


def _measured(
    function: str, clipper: Clipper, settings: Settings, amp: Amp, whole: Shards | None
) -> _Measured:
    spread = whole or over_ranks_of(function, clipper.params, settings)
    present, names, at = clipper.present()
    found, norms, is_float64 = None, None, False
    if spread is not None:
        norm, found = spread.total_norm(settings.norm_type, amp.found_inf)
    elif present:
        grads = dense_values(present)
        is_float64 = returned_dtype(grads) == torch.float64
        norm, norms = measured(clipper.max_norm, present, grads, settings.norm_type)
    else:
        norm = torch.zeros((), dtype=torch.float64, device="cpu")
    if amp.grad_scale is not None:
        norm = norm / amp.grad_scale.to(norm.device)
    if found is None and amp.found_inf is not None:
        found = amp.found_inf.to(norm.device)
    gradients = Gradients(present, norm, settings.norm_type, names, amp.grad_scale, spread, norms, at)
    return _Measured(clipper.max_norm, gradients, found, is_float64)


def _decided(
    each: list[_Measured], settings: Settings, amp: Amp, optimizer: Optimizer
) -> tuple[Outcome, Tensor, Within | None, bool]:
    """Return what follows for the step as a whole, the coefficients in the order of the groups, the rest."""
    home = next((m for m in each if m.gradients.parameters), each[0]).gradients.total_norm
    norms = [m.gradients.total_norm.to(home) for m in each]
    norm = norms[0] if len(norms) == 1 else combined(norms, settings.norm_type, [torch.float64])
    is_one = len(each) == 1
    is_alone = is_one and each[0].found is None
    skipped = None if is_alone else _unusable(norm, each, settings)
    decisions = []
    for m in each:
        if skipped is not None:  # what a scaler or another group leaves out is nothing to learn from
            m.gradients.total_norm = torch.where(skipped, math.nan, m.gradients.total_norm.to(home))
        decision = _decision(m)
        if decision.within is not None and not (is_one and decision.within.folds(m.gradients.parameters)):
            decision.within.clip_(m.gradients.parameters, m.gradients.scale, m.gradients.shards)
            decision = replace(decision, within=None)
        decisions.append(decision)
    outliers = [decision.outlier for decision in decisions if decision.outlier is not None]
    may_skip = settings.skips or amp.found_inf is not None or bool(outliers)
    if is_alone and settings.skips and outliers:
        skipped = outliers[0]  # of what is not finite, too
    else:
        skipped = _unusable(norm, each, settings) if skipped is None else skipped
        for outlier in outliers:
            skipped = skipped | (outlier & (norm < math.inf))
    coefs = decisions[0].coefs.to(home) if is_one else _in_order(optimizer, each, decisions, home)
    threshold = decisions[0].threshold if is_one else None
    shown = coefs.amin() if coefs.numel() > 1 else coefs.reshape(())
    within = decisions[0].within if is_one else None
    return Outcome(norm, shown, skipped, threshold), coefs, within, may_skip


def _unusable(norm: Tensor, each: list[_Measured], settings: Settings) -> Tensor:
    """Return whether a step is left out whatever strategies say: it is not finite, or a scaler found inf."""
    # The comparison is False of nan, too.
    skipped = ~(norm < math.inf) if settings.skips else torch.zeros_like(norm, dtype=torch.bool)
    for m in each:
        if m.found is not None:
            skipped = skipped | (m.found.to(norm.device) != 0)
    return skipped


def _in_order(optimizer: Optimizer, each: list[_Measured], decisions: list[Decision], home: Tensor) -> Tensor:
    """Return a coefficient for each gradient, in the order of the groups; 1 if there is none."""
    place: dict[Tensor, int] = {}
    every = [home.new_ones(1)]
    for m, decision in zip(each, decisions, strict=True):
        params = m.gradients.parameters
        place.update({param: len(place) + i for i, param in enumerate(params)})
        every.append(decision.coefs.to(home).expand(len(params)))
    order = [1 + place[param] for param in parameters(optimizer)]
    return torch.cat(every)[order or [0]]


def _decision(one: _Measured) -> Decision:
    limit, norm = one.max_norm, one.gradients.total_norm
    if isinstance(limit, Strategy):
        return limit.decide(one.gradients)
    return Decision(clip_coefficient(limit, norm).reshape(1))
