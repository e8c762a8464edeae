"""The same threshold in every step."""

from __future__ import annotations

from torch import Tensor

from fastclip.strategies.base import Global, positive


class Fixed(Global):
    """threshold = c.

    Args:
        max_norm: c > 0; inf measures only.

    Source:
        torch.nn.utils.clip_grad_norm_; Pascanu, Mikolov and Bengio, On the difficulty of training recurrent
        neural networks, 2013.
    """

    def __init__(self, max_norm: float = 1.0) -> None:
        super().__init__()
        self.max_norm = positive("Fixed", "max_norm", max_norm)

    def threshold(self, norm: Tensor) -> Tensor:
        """Return c."""
        return norm.new_full((), self.max_norm)

    def observe(self, norm: Tensor) -> None:
        """Learn nothing."""
