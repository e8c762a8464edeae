"""The parameters that a monitor watches: their names and modules, their norms, who is not finite."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from fastclip.clip_grad import get_total_norm
from fastclip.monitor.blocks import NO_GRADIENT
from fastclip.norms import find_nonfinite, grad_norms

MAX_NAMED = 20
"""Parameters that are named in the record of a step that is not finite."""


@dataclass(frozen=True)
class Place:
    """Where a parameter stands.

    Attributes:
        name: As in `model.named_parameters()`, else as in the optimizer's `param_names`, else its position.
        module: Name of the module that holds it; empty for the model itself, or if there are no names.
        kind: Class of that module; empty without a model.
    """

    name: str
    module: str
    kind: str


class Parameters:
    """The parameters of an optimizer, in the order of its groups.

    Args:
        optimizer: Which has them.
        model: Which names them; None leaves that to the optimizer.
    """

    def __init__(self, optimizer: Optimizer, model: nn.Module | None) -> None:
        self._optimizer = optimizer
        self._kinds = {} if model is None else {n: type(m).__name__ for n, m in model.named_modules()}
        self._named = {} if model is None else {id(p): n for n, p in model.named_parameters()}
        self.tensors: list[Tensor] = []
        self.places: list[Place] = []
        for parameter, place in self._list():
            self.tensors.append(parameter)
            self.places.append(place)
        self.modules: dict[str, list[int]] = {}
        for index, place in enumerate(self.places):
            self.modules.setdefault(place.module or place.name, []).append(index)

    def _list(self) -> list[tuple[Tensor, Place]]:
        """Return them as they are at this moment; groups may have been added."""
        found = []
        for number, group in enumerate(self._optimizer.param_groups):
            own = group.get("param_names") or [
                f"parameter {i} of group {number}" for i in range(len(group["params"]))
            ]
            for parameter, unnamed in zip(group["params"], own, strict=True):
                name = self._named.get(id(parameter), unnamed)
                module = name.rpartition(".")[0]
                found.append((parameter, Place(name, module, self._kinds.get(module, ""))))
        return found

    @torch.no_grad()
    def norms(self, total: Tensor, norm_type: float) -> Tensor:
        """Return the norm of each gradient before it was scaled, as one that follows a step can know it.

        A step may leave gradients clipped, or multiplied by a GradScaler's scale: equal factors for all, so
        the ratio of the total norm to theirs undoes them. Where a strategy has given each its own factor and
        the step was not folded, their proportions are those after the clip. One read of the gradients, no
        synchronization but for DTensors.

        Args:
            total: Norm of all before clipping, 0-dim.
            norm_type: Its p.

        Returns:
            1-d, one per parameter, on the device of the gradients; NO_GRADIENT for one that has none.
        """
        present = [i for i, parameter in enumerate(self.tensors) if parameter.grad is not None]
        if not present:
            return torch.full((len(self.tensors),), NO_GRADIENT, device=total.device)
        measured = grad_norms([self.tensors[i] for i in present], norm_type)
        found = torch.linalg.vector_norm(measured, norm_type)
        factor = total.to(measured.device, measured.dtype, non_blocking=True) / found
        measured = torch.where(factor.isfinite(), factor, 1.0) * measured
        if len(present) == len(self.tensors):
            return measured
        norms = measured.new_full((len(self.tensors),), NO_GRADIENT)
        norms[torch.tensor(present).to(norms.device, non_blocking=True)] = measured
        return norms

    def nonfinite(self) -> dict[str, Any]:
        """Return which gradients hold nan or inf and how many; synchronizes with the device."""
        named = {place.name: (parameter, place) for parameter, place in self._list()}
        found = find_nonfinite([(name, parameter) for name, (parameter, _) in named.items()])
        listed = [
            _entry(named[name][1], counts.nan, counts.inf) for name, counts in list(found.items())[:MAX_NAMED]
        ]
        return {"num_parameters": len(found), "parameters": listed}

    def nonfinite_by_norms(self, norms: NDArray[np.float32]) -> dict[str, Any]:
        """Return the same of a step whose norms are all that is left; a norm hides how many."""
        wrong = [place for place, norm in zip(self.places, norms, strict=True) if not math.isfinite(norm)]
        return {
            "num_parameters": len(wrong),
            "parameters": [_entry(p, None, None) for p in wrong[:MAX_NAMED]],
        }


def _entry(place: Place, nan: int | None, inf: int | None) -> dict[str, Any]:
    return {"name": place.name, "module": place.module, "class": place.kind, "nan": nan, "inf": inf}


class UpdateRatio:
    """Measures how far one step moves the weights: the norm of the update over the norm of the weights.

    Holds a copy of the weights for the length of that step; reads them five times and writes them twice.
    """

    def __init__(self, parameters: list[Tensor]) -> None:
        """Copy the weights, before the step."""
        self._parameters = parameters
        self._before = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def after_step(self) -> Tensor:
        """Return the ratio, 0-dim; nan if all weights were 0."""
        size = get_total_norm(self._before)
        for before, parameter in zip(self._before, self._parameters, strict=True):
            before.sub_(parameter)  # in place: fresh memory would cost as much as the rest
        return get_total_norm(self._before) / size
