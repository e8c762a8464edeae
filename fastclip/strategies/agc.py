"""A threshold for each output unit that goes with the size of its weights."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

import torch
from torch import Tensor

from fastclip.strategies.base import Decision, Gradients, Strategy, positive


class AGC(Strategy):
    """The gradient of each output unit is scaled, in `.grad`, by min(1, clipping * max(|w|, eps) / |g|).

    |w| and |g| are the 2-norms of the unit's weights and of their gradient: along every dimension but the
    first, or of the whole of a bias or gain. eps lets a weight that is zero move. Reads gradients and weights
    once and writes what is clipped, in a few launches per parameter.

    Args:
        clipping: The longest step, in weights.
        eps: Taken for the norm of weights that are smaller.
        exclude: Patterns, as of a shell, of the names of parameters to leave alone: the source leaves out the
            last layer. Names come from an optimizer made of `model.named_parameters()`.

    Source:
        Brock, De, Smith and Simonyan, High-Performance Large-Scale Image Recognition Without Normalization,
        2021.
    """

    def __init__(self, clipping: float = 0.01, eps: float = 1e-3, exclude: Sequence[str] = ()) -> None:
        super().__init__()
        self.clipping = positive("AGC", "clipping", clipping)
        self.eps = positive("AGC", "eps", eps)
        self.exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude)

    def decide(self, gradients: Gradients) -> Decision:
        """Scale the gradients of units; what is left of them stays as it is."""
        if gradients.shards is not None:
            raise ValueError(
                "AGC: the gradients are spread over ranks, where a unit may be in parts; expected whole "
                "parameters. PerTensor and Ema(per_tensor=True) take shards."
            )
        names = gradients.names
        if self.exclude and names is None:
            raise ValueError(
                "AGC: exclude is given, and the parameters have no names; expected an optimizer made of "
                "model.named_parameters(), or (name, parameter) pairs."
            )
        with torch.no_grad():
            for number, param in enumerate(gradients.parameters):
                if names is None or not any(fnmatch.fnmatch(names[number], e) for e in self.exclude):
                    self._clip(param, gradients.scale)
        return Decision(gradients.total_norm.new_ones(1))

    def _clip(self, param: Tensor, scale: Tensor | None) -> None:
        grad = param.grad
        assert grad is not None  # `Gradients` holds no others
        if grad.layout is not torch.strided:
            raise ValueError("AGC: a gradient is sparse; expected dense ones. exclude can leave it out.")
        weight_norm, grad_norm = _of_units(param.detach()), _of_units(grad)
        limit = weight_norm.clamp_(min=self.eps).mul_(self.clipping)
        if scale is not None:
            limit = limit * scale
        # Where the gradient is 0 the quotient is inf, and 1 is left.
        grad.mul_((limit / grad_norm).clamp_(max=1.0).to(grad.dtype))


def _of_units(tensor: Tensor) -> Tensor:
    """Return the norm of each unit, shaped to be multiplied with the tensor."""
    dims = tuple(range(1, tensor.dim())) if tensor.dim() > 1 else None
    wide = torch.promote_types(tensor.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(tensor, 2, dims, keepdim=tensor.dim() > 1, dtype=wide)
    return norm
