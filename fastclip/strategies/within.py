"""What is clipped within each gradient, where one coefficient for all of it does not do.

A step by fastclip's kernels folds it into the update, where it costs no memory traffic of its own; everywhere
else it is done to `.grad` in place.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastclip import backends
from fastclip.backends import Backend, Declined, cpu
from fastclip.backends.base import is_by_units, unit_numel
from fastclip.distributed import Shards


class Within(ABC):
    """A rule for the parts of each gradient."""

    @abstractmethod
    def clip_(
        self, params: Sequence[Tensor], scale: Tensor | None = None, spread: Shards | None = None
    ) -> None:
        """Clip the gradients of these parameters in place.

        Args:
            params: Those that have a gradient.
            scale: The gradients are this many times too large, 0-dim; None: they are not.
            spread: What this rank holds of them, if others hold further parts.
        """

    @abstractmethod
    def folds(self, params: Sequence[Tensor]) -> bool:
        """Tell whether the step by fastclip's kernels can do it to these."""


@dataclass(frozen=True)
class Elements(Within):
    """Each element is clamped to [-max_value, max_value]; nan stays nan.

    Attributes:
        max_value: The largest magnitude to leave, > 0.
    """

    max_value: float

    def clip_(
        self, params: Sequence[Tensor], scale: Tensor | None = None, spread: Shards | None = None
    ) -> None:
        """Clamp in one pass; a scale on a device is read there."""
        limit = self.max_value if scale is None else scale * self.max_value
        if spread is not None:
            spread.elementwise("clamp", limit)
        elif params:
            backends.run(Backend.elementwise_, list(params), "clamp", limit)

    def folds(self, params: Sequence[Tensor]) -> bool:
        """Every kernel clamps on the way."""
        return True


@dataclass(frozen=True)
class Units(Within):
    """The gradient of each unit has at most the norm ratio * max(|weights of the unit|, eps).

    Units lie along the first dimension; a tensor of one dimension or none is one unit.

    Attributes:
        ratio: Of the norm of a unit's gradient to that of its weights, > 0.
        eps: Taken for the norm of weights that are smaller.
        included: Whether the parameter is clipped, for each.
    """

    ratio: float
    eps: float
    included: Sequence[bool]

    def clip_(
        self, params: Sequence[Tensor], scale: Tensor | None = None, spread: Shards | None = None
    ) -> None:
        """Clip in one launch by Triton's kernel, else by torch's operations for each parameter.

        Raises:
            ValueError: a gradient is sparse.
        """
        assert spread is None  # AGC refuses them
        asked = list(params), self.included, self.ratio, self.eps, scale
        if not isinstance(backends.run(Backend.clip_units_, *asked), Declined):
            return
        with torch.no_grad():
            for param, is_included in zip(params, self.included, strict=True):
                if is_included:
                    self._clip(param, scale)

    def folds(self, params: Sequence[Tensor]) -> bool:
        """The CPU's kernels do it where the memory of a parameter is one unit behind the other."""
        if backends.chosen() not in ("auto", "cpu") or cpu.unavailable_reason() is not None:
            return False
        return all(
            p.device.type == "cpu" and is_by_units(p) and _has_dense_grad(p)
            for p, on in zip(params, self.included, strict=True)
            if on
        )

    def numels(self, params: Sequence[Tensor]) -> list[int]:
        """Return the elements of a unit of each parameter, 0 for one to be left alone."""
        return [unit_numel(p) if on and p.numel() else 0 for p, on in zip(params, self.included, strict=True)]

    def _clip(self, param: Tensor, scale: Tensor | None) -> None:
        grad = param.grad
        assert grad is not None  # `params` holds no others
        if grad.layout is not torch.strided:
            raise ValueError("AGC: a gradient is sparse; expected dense ones. exclude can leave it out.")
        weight_norm, grad_norm = _norms_of_units(param.detach()), _norms_of_units(grad)
        limit = weight_norm.clamp_(min=self.eps).mul_(self.ratio)
        if scale is not None:
            limit = limit * scale
        # Where the gradient is 0 the quotient is inf, and 1 is left.
        grad.mul_((limit / grad_norm).clamp_(max=1.0).to(grad.dtype))


def _has_dense_grad(param: Tensor) -> bool:
    return param.grad is not None and param.grad.layout is torch.strided


def _norms_of_units(tensor: Tensor) -> Tensor:
    """Return the norm of each unit, shaped to be multiplied with the tensor."""
    dims = tuple(range(1, tensor.dim())) if tensor.dim() > 1 else None
    wide = torch.promote_types(tensor.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(tensor, 2, dims, keepdim=tensor.dim() > 1, dtype=wide)
    return norm
