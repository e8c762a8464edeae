"""A threshold for each output unit that goes with the size of its weights."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from torch import Tensor

from fastclip.strategies.base import Decision, Gradients, Strategy, positive
from fastclip.strategies.within import Units


class AGC(Strategy):
    """The gradient of each output unit is scaled by min(1, clipping * max(|w|, eps) / |g|).

    |w| and |g| are the 2-norms of the unit's weights and of their gradient: along every dimension but the
    first, or of the whole of a bias or gain. eps lets a weight that is zero move.

    Folded into the step of the CPU's kernels, which have to read the weights anyway; else in `.grad` itself,
    on a device by one launch of Triton's kernels.

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

    def within(self, parameters: Sequence[Tensor], names: Sequence[str] | None) -> Units:
        """Return the rule for the units.

        Raises:
            ValueError: Parameters are to be excluded by name, and have none.
        """
        if self.exclude and names is None:
            raise ValueError(
                "AGC: exclude is given, and the parameters have no names; expected an optimizer made of "
                "model.named_parameters(), or (name, parameter) pairs."
            )
        included = [
            names is None or not any(fnmatch.fnmatch(names[i], pattern) for pattern in self.exclude)
            for i in range(len(parameters))
        ]
        return Units(self.clipping, self.eps, included)

    def decide(self, gradients: Gradients) -> Decision:
        """Leave the gradients as they are, but for their units."""
        if gradients.shards is not None:
            raise ValueError(
                "AGC: the gradients are spread over ranks, where a unit may be in parts; expected whole "
                "parameters. PerTensor and Ema(per_tensor=True) take shards."
            )
        units = self.within(gradients.parameters, gradients.names)
        return Decision(gradients.total_norm.new_ones(1), within=units)
