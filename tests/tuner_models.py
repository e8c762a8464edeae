"""Models and data for the tuner's tests, which workers import: nothing of the search, which loads slowly."""

from __future__ import annotations

import json
import os
import resource
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

NUM_CLASSES = 3
DEADLY, HANGING = 0.66, 0.77


def blobs(n: int = 90, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Three well separated classes in four dimensions."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % NUM_CLASSES
    centres = np.array([[3.0, 0, 0, 0], [0, 3.0, 0, 0], [0, 0, 3.0, 0]])
    X = centres[y] + rng.normal(size=(n, 4))  # noqa: N806
    return torch.tensor(X, dtype=torch.float32), torch.tensor(y)


def line(n: int = 60, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A noisy linear regression."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, 4))  # noqa: N806
    y = X @ np.array([1.0, -2.0, 0.5, 0.0]) + 0.01 * rng.normal(size=n)
    return torch.tensor(X, dtype=torch.float32), torch.tensor(y, dtype=torch.float32)


def mlp(params: dict[str, Any]) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, NUM_CLASSES))


def dropping_out(params: dict[str, Any]) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Dropout(), nn.Linear(16, NUM_CLASSES))


def linear_regressor(params: dict[str, Any]) -> nn.Module:
    return nn.Linear(4, 1)


def one_group(model: nn.Module, params: dict[str, Any]) -> list[dict[str, Any]]:
    """Parameter groups: all in one."""
    return [{"params": list(model.parameters())}]


class NanAfter(nn.Module):
    """Outputs become NaN after a number of training steps."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.layer = nn.Linear(4, NUM_CLASSES)
        self.steps_left = steps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.steps_left -= 1
        factor = torch.nan if self.steps_left < 0 else 1.0
        return self.layer(x) * factor


def nan_above_half(params: dict[str, Any]) -> nn.Module:
    """Explodes after three steps when lr is above 0.5."""
    return NanAfter(3 if params["lr"] > 0.5 else 10**9)


def always_nan(params: dict[str, Any]) -> nn.Module:
    return NanAfter(2)


def broken(params: dict[str, Any]) -> nn.Module:
    raise ValueError("no such layer")


def out_of_memory_above_32(params: dict[str, Any]) -> nn.Module:
    if params["batch_size"] > 32:
        raise torch.OutOfMemoryError("CUDA out of memory")
    return mlp(params)


def dangerous(params: dict[str, Any]) -> nn.Module:
    """Kills or hangs its process at certain rates; kills it once unless the file `kill_unless` is there."""
    marker = Path(params.get("kill_unless", "/"))
    if params["lr"] == DEADLY or not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if params["lr"] == HANGING:
        time.sleep(3600)
    return noting_process(mlp(params), params["folder"]) if "folder" in params else mlp(params)


def noting_surroundings(params: dict[str, Any]) -> nn.Module:
    """Writes to the folder what a process that trains was given, which one forked it, and if too late."""
    limit, _ = resource.getrlimit(resource.RLIMIT_DATA)
    told = [os.environ.get("FASTCLIP_TEST_VARIABLE"), limit, os.getppid(), torch.cuda._is_in_bad_fork()]
    (Path(params["folder"]) / str(os.getpid())).write_text(json.dumps(told))
    return mlp(params)


def noting_process(model: nn.Module, folder: str) -> nn.Module:
    """Return the model, which writes the process that runs it to the folder."""
    model.register_forward_pre_hook(lambda *_: (Path(folder) / str(os.getpid())).touch())
    return model


class Slow(nn.Module):
    """Takes 50 ms per call."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, NUM_CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.05)
        return self.layer(x)


def slow(params: dict[str, Any]) -> nn.Module:
    return Slow()


def pid_model(params: dict[str, Any]) -> nn.Module:
    """Writes the process that trains it to `params["folder"]`."""
    return noting_process(slow(params), params["folder"])
