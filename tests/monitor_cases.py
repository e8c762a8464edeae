"""Trainings for the tests of the monitor: small, and with norms that are known."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastclip

MAX_NORM = 1.0


class Net(nn.Module):
    """Two layers, named as in a language model."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Linear(4, 8)
        self.h = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 1)])

    def forward(self, x: Tensor) -> Tensor:
        return self.h[1](torch.tanh(self.h[0](self.emb(x))))


def make(
    *, attach: bool = False, max_norm: float = MAX_NORM, **settings: Any
) -> tuple[Net, torch.optim.Optimizer, Any]:
    """Return a net, the optimizer to step, and what a monitor is given."""
    torch.manual_seed(0)
    net = Net()
    plain = torch.optim.AdamW(net.parameters(), lr=1e-3)
    if attach:
        return net, plain, fastclip.attach(plain, max_norm, **settings)
    clipped = fastclip.ClippedOptimizer(plain, max_norm, **settings)
    return net, clipped, clipped


def backward(
    net: nn.Module, seed: int, *, poisoned: bool = False, scaler: torch.amp.GradScaler | None = None
) -> Tensor:
    """Leave gradients and return the loss."""
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(seed))
    if poisoned:
        x[3] = math.nan
    net.zero_grad()
    loss = (net(x) - x.sum(1, keepdim=True)).square().mean()
    (loss if scaler is None else scaler.scale(loss)).backward()
    return loss


class Norms:
    """A clipped optimizer of two parameters whose gradients have the norms that a test gives.

    `h.a` and `h.b` have one element each; SGD without a rate leaves them alone.
    """

    def __init__(self, max_norm: Any = MAX_NORM) -> None:
        self.model = nn.Module()
        self.model.h = nn.Module()
        self.model.h.a = nn.Linear(1, 1, bias=False)
        self.model.h.b = nn.Linear(1, 1, bias=False)
        self.a, self.b = self.model.parameters()
        self.optimizer = fastclip.ClippedOptimizer(torch.optim.SGD(self.model.parameters(), lr=0.0), max_norm)

    def step(self, a: float, b: float = 0.0) -> None:
        self.a.grad, self.b.grad = torch.full((1, 1), a), torch.full((1, 1), b)
        self.optimizer.step()


def lines(run: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Return the records in a run's file, of one kind if it is given."""
    found = [json.loads(line) for line in (run / "monitor.jsonl").read_text().splitlines()]
    return [record for record in found if kind in (None, record["kind"])]
