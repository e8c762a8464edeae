"""What a strategy is: a rule that sets the threshold, or the coefficients, of each step."""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from fastclip import backends
from fastclip.backends import Backend
from fastclip.backends.eager import are_plain, clip_coefficient, combined, returned_dtype, wide_dtype
from fastclip.distributed import Shards, shards
from fastclip.distributed.marks import Ranks
from fastclip.strategies import on_device
from fastclip.strategies.within import Within


class Gradients:
    """What a strategy decides on: the gradients of one step, which may be those of all ranks together.

    Attributes:
        parameters: Those that have a gradient on this rank.
        total_norm: Of all gradients, divided by a GradScaler's scale; 0-dim float64 (float32 where the device
            has none), on their device.
        names: Of the parameters, or None.
        scale: The gradients are this many times too large; 0-dim, or None.
        shards: What this rank holds, if others hold further parts.
        at: The places of the parameters among all, also those without a gradient; None if that is not known,
            as where other ranks hold further parts.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        total_norm: Tensor,
        norm_type: float = 2.0,
        names: Sequence[str] | None = None,
        scale: Tensor | None = None,
        shards: Shards | None = None,
        norms: Tensor | None = None,
        at: list[int] | None = None,
    ) -> None:
        """Take what is known of them; `norms` of each, if they are, GradScaler's scale included."""
        self.parameters, self.total_norm, self.names = parameters, total_norm, names
        self.scale = None if scale is None else scale.to(total_norm.device)
        self.shards, self.at = shards, at if shards is None else None
        self._norm_type, self._scaled_norms = norm_type, norms

    @functools.cached_property
    def norms(self) -> Tensor:
        """Return the norm of each, like `total_norm`, 1-dim; reads every gradient unless they are known."""
        if self._scaled_norms is not None:
            norms = self._scaled_norms
        elif self.shards is not None:
            norms = self.shards.norms(self._norm_type)
        else:
            dtype = self.total_norm.dtype
            norms = backends.run(Backend.grad_norms, list(self.parameters), self._norm_type, dtype)
        norms = norms.to(self.total_norm)
        return norms if self.scale is None else norms / self.scale


@dataclass(frozen=True)
class Decision:
    """What a strategy makes of the gradients of one step.

    Attributes:
        coefs: What to multiply them by: one for all or, in the order of the parameters, one for each; 1-dim.
        threshold: The norm from which on they are clipped, 0-dim; None where there is none for all.
        outlier: Whether to leave the step out, 0-dim bool, True of a norm that is not finite; None: not for
            this strategy to say.
        within: What is clipped within each gradient, after its coefficient; None: nothing.
    """

    coefs: Tensor
    threshold: Tensor | None = None
    outlier: Tensor | None = None
    within: Within | None = None


class Strategy(ABC):
    """A rule that sets how much of each step's gradients is left, from what it has seen of them.

    Goes wherever a max_norm goes: `ClippedOptimizer`, `attach`, a parameter group's "max_norm". What it
    has seen is on the gradients' device, and is never asked for: no step waits for the device.

    A norm that is not finite is never seen: whatever becomes of the step, the statistics do not change.
    """

    def __init__(self) -> None:
        """Start from nothing."""
        self._state: dict[str, Tensor] = {}
        self._last: Decision | None = None
        self._at: list[int] | None = None

    @property
    def last(self) -> Decision | None:
        """Return what the latest `clip_grad_norm_` decided; None before the first."""
        return self._last

    @abstractmethod
    def decide(self, gradients: Gradients) -> Decision:
        """Return what to do with these gradients, and learn from them."""

    def within(self, parameters: Sequence[Tensor], names: Sequence[str] | None) -> Within | None:
        """Return what to clip within each gradient where that is all it does, whatever their norm; else None.

        Args:
            parameters: Those that have a gradient.
            names: Of them, or None.
        """
        return None

    @property
    def of_each(self) -> bool:
        """Whether it asks for the norm of each gradient: the total norm then follows from these."""
        return False

    @property
    def grows(self) -> bool:
        """Whether what it remembers becomes more with every step."""
        return False

    def begin(self, norms: Tensor) -> None:
        """Forget all: the state is that of before a first step, of gradients with norms like these, 1-dim."""
        self._state, self._at = self._initial(norms if self.of_each else norms.new_zeros(1)), None

    def _initial(self, like: Tensor) -> dict[str, Tensor]:
        """Return the state before the first step, of device and dtype of `like`: a norm, or those of each."""
        return {}

    def _on(self, like: Tensor) -> dict[str, Tensor]:
        """Return the state, from now on where `like` is."""
        if not self._state:
            self._state = self._initial(like)
        elif next(iter(self._state.values())).device != like.device:
            self._state = {name: value.to(like.device) for name, value in self._state.items()}
        return self._state

    def _of_norms(self, norms: Tensor, at: list[int] | None) -> dict[str, Tensor]:
        """Return a state with an entry for each norm, which are of the parameters in these places.

        Raises:
            ValueError: There are more or fewer norms than in the step before, or those of other parameters.
        """
        state = self._on(norms)
        if (before := next(iter(state.values())).numel()) != norms.numel():
            raise ValueError(
                f"{type(self).__name__}: {norms.numel()} parameters have a gradient, and {before} had one "
                f"before; expected the same in every step."
            )
        if at is not None and self._at is not None and at != self._at:
            place = min(set(at) ^ set(self._at))
            now, earlier = ("a", "none") if place in at else ("no", "one")
            raise ValueError(
                f"{type(self).__name__}: parameter {place} has {now} gradient, and had {earlier} before; "
                f"expected the same parameters in every step."
            )
        self._at = at
        return state

    def state_dict(self) -> dict[str, Any]:
        """Return the class and what it has seen, as copies; the settings stay with the object."""
        return {"strategy": type(self).__name__, **{k: v.clone() for k, v in self._state.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from where another run was.

        Raises:
            ValueError: It is of another strategy, or of one with a window of another length.
        """
        state = dict(state_dict)
        name, own = state.pop("strategy", None), type(self).__name__
        if name != own:
            raise ValueError(f"{own}.load_state_dict: this is the state of {name}; expected that of {own}.")
        tensors = {key: torch.as_tensor(value).detach().clone() for key, value in state.items()}
        if tensors:
            like = next(iter(tensors.values()))
            expected = self._initial(like)
            if wrong := self._unlike(tensors, expected):
                raise ValueError(f"{own}.load_state_dict: {wrong}; expected the same settings as before.")
        self._state, self._at = tensors, None

    def _unlike(self, state: dict[str, Tensor], expected: dict[str, Tensor]) -> str | None:
        """Return in what a state differs from what this strategy keeps, or None."""
        if state.keys() != expected.keys():
            return f"the state has {', '.join(state)} and not {', '.join(expected)}"
        for key, value in state.items():
            if value.shape != expected[key].shape:
                return f"{key} has shape {tuple(value.shape)} and not {tuple(expected[key].shape)}"
        return None

    def clip_grad_norm_(
        self,
        parameters: Tensor | Iterable[Tensor] | Iterable[tuple[str, Tensor]],
        norm_type: float = 2.0,
        *,
        group: Ranks | None = None,
        mesh: DeviceMesh | None = None,
    ) -> Tensor:
        """Clip the gradients in place as this strategy has it, and learn from them.

        Args:
            parameters: A tensor, an iterable of tensors, or one of (name, tensor) pairs; those without a
                gradient are skipped.
            norm_type: p > 0 of the p-norm, or inf.
            group: As in `fastclip.clip_grad_norm_`.
            mesh: As in `fastclip.clip_grad_norm_`.

        Returns:
            The total norm before clipping, as `fastclip.clip_grad_norm_` does. A norm that is not finite, and
            a step that is an outlier to `Skip`, leave the gradients as they are: look at it before the step.

        Reads every gradient once, twice where each has a coefficient of its own, and writes what is clipped.
        """
        names, listed = _named(parameters)
        norms = None
        spread = shards(
            "clip_grad_norm_", listed, of_gradients=True, group=group, mesh=mesh, norm_type=norm_type
        )
        at = [i for i, p in enumerate(listed) if p.grad is not None]
        params = [listed[i] for i in at]
        grads = [p.grad for p in params if p.grad is not None]
        if spread is not None:
            norm, _ = spread.total_norm(float(norm_type))
            returned = spread.returned(norm)
        elif grads:
            norm, norms = measured(self, params, grads, float(norm_type))
            returned = norm.to(returned_dtype(grads))
        else:
            return torch.tensor(0.0)
        named = None if names is None else [names[i] for i in at]
        decision = self._last = self.decide(
            Gradients(params, norm, float(norm_type), named, shards=spread, norms=norms, at=at)
        )
        keep = ~norm.isfinite()
        if decision.outlier is not None:
            keep = keep | decision.outlier
        coefs = torch.where(keep, 1.0, decision.coefs)
        if spread is not None:
            spread.multiply(coefs)
        else:
            backends.run(Backend.scale_grads_, params, coefs)
        if decision.within is not None:
            decision.within.clip_(params, None, spread)
        return returned

    def __repr__(self) -> str:
        """Return the class and its settings."""
        settings = {k: v for k, v in vars(self).items() if not k.startswith("_")}
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in settings.items())})"


class Global(Strategy):
    """A strategy with one threshold for the norm of all gradients together."""

    predicts: ClassVar[bool] = True
    """Whether the threshold follows from earlier steps alone. Then the kernels that measure also clip."""

    @abstractmethod
    def threshold(self, norm: Tensor) -> Tensor:
        """Return the largest norm to leave, 0-dim like `norm`, which counts unless the strategy predicts."""

    @abstractmethod
    def observe(self, norm: Tensor) -> None:
        """Learn from the norm of a step before clipping, 0-dim; in place, so that a graph can hold it."""

    def learn(self, norm: Tensor, skipped: Tensor | None = None) -> None:
        """Observe the norm of a step, unless it was skipped; on a device in one launch, if it can be."""
        if (kernels := on_device.kernels(norm)) is not None and self._learn_by(kernels, norm, skipped):
            return
        norm = norm.to(wide_dtype(norm))
        self.observe(norm if skipped is None else torch.where(skipped, math.nan, norm))

    def _learn_by(self, kernels: Any, norm: Tensor, skipped: Tensor | None) -> bool:
        """Learn by a kernel of `kernels.thresholds`, or return False if there is none."""
        return False

    def decide(self, gradients: Gradients) -> Decision:
        """Return min(1, threshold / (norm + 1e-6)) for all."""
        norm = gradients.total_norm
        # A copy: what is observed may change the state that the threshold stands in.
        limit = self.threshold(norm).clone()
        self.learn(norm)
        return Decision(clip_coefficient(limit, norm).reshape(1), limit)


def measured(
    strategy: object, params: Sequence[Tensor], grads: list[Tensor], norm_type: float
) -> tuple[Tensor, Tensor | None]:
    """Return the total norm and, where a strategy asks for them, those of which it is made; one read."""
    wide = wide_dtype(grads[0])
    if isinstance(strategy, Strategy) and strategy.of_each and norm_type > 0 and are_plain(grads):
        norms = backends.run(Backend.grad_norms, list(params), norm_type, wide).to(wide)
        return combined([norms], norm_type, {grad.dtype for grad in grads}), norms
    return backends.run(Backend.total_norm, grads, norm_type, wide).to(wide), None


def checked(strategy: str, name: str, value: float, ok: Callable[[float], bool], expected: str) -> float:
    """Return a setting as a float.

    Raises:
        ValueError: It is not what is expected.
    """
    number = float(value)
    if not ok(number):
        raise ValueError(f"{strategy}: {name}={value}; expected {expected}.")
    return number


def positive(strategy: str, name: str, value: float) -> float:
    """Return a setting that has to be > 0."""
    return checked(strategy, name, value, lambda x: x > 0, "a number > 0")


def share(strategy: str, name: str, value: float) -> float:
    """Return a setting that has to lie between 0 and 1."""
    return checked(strategy, name, value, lambda x: 0 < x < 1, "a number between 0 and 1")


def count(strategy: str, name: str, value: int, least: int) -> int:
    """Return a setting that has to be a whole number from `least` on."""
    return int(checked(strategy, name, value, lambda x: x >= least and x == int(x), f"at least {least}"))


def _named(
    parameters: Tensor | Iterable[Tensor] | Iterable[tuple[str, Tensor]],
) -> tuple[list[str] | None, list[Tensor]]:
    if isinstance(parameters, Tensor):
        return None, [parameters]
    listed: list[Any] = list(parameters)
    if listed and isinstance(listed[0], tuple):
        return [name for name, _ in listed], [param for _, param in listed]
    return None, listed
