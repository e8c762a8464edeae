"""Clipping inside the optimizer's step.

    optimizer = fastclip.ClippedOptimizer(torch.optim.AdamW(model.parameters(), lr=3e-4), max_norm=1.0)

`wrapper`, `attach` and `grad_scaler` are what callers see. A step goes the first route that takes it:
`native` or, by `routes`, `torch_fused` or `plain`. The rest serves them all.
"""

from fastclip.optim.attach import AttachedClipping, attach
from fastclip.optim.grad_scaler import GradScaler
from fastclip.optim.outcome import Outcome, Stats
from fastclip.optim.wrapper import ClippedOptimizer

__all__ = ["AttachedClipping", "ClippedOptimizer", "GradScaler", "Outcome", "Stats", "attach"]
