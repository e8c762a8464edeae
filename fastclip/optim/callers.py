"""Who is calling, where torch asks an optimizer for one thing and means another.

Neither torch's GradScaler nor torch.distributed.checkpoint hands itself over, so the stack has to say. Each
function looks at a few frames, and only where it can matter.
"""

from __future__ import annotations

import sys
from types import FrameType

import torch

_CHECKPOINT = "torch.distributed.checkpoint.state_dict"
# Between torch's function and ours: torch's profiling of a step, a scheduler's count, a trainer's optimizer.
_REACH = 8


def stepping_scaler() -> torch.amp.GradScaler | None:
    """Return the GradScaler whose `step` is reading an attribute of an optimizer, for its property to ask."""
    reader = sys._getframe(2)
    if reader.f_code is not torch.amp.GradScaler.step.__code__:
        return None
    scaler: torch.amp.GradScaler = reader.f_locals["self"]
    return scaler


def is_checkpointing() -> bool:
    """Whether torch.distributed.checkpoint gets or sets the state of an optimizer.

    It takes a step with gradients of 0 to see what state there is, and carries nothing but state and groups.
    """
    if torch.compiler.is_compiling() or _CHECKPOINT not in sys.modules:
        return False
    frame: FrameType | None = sys._getframe(2)
    for _ in range(_REACH):
        if frame is None:
            return False
        if frame.f_globals.get("__name__") == _CHECKPOINT:
            return True
        frame = frame.f_back
    return False
