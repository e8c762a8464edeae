"""What trainers of other packages are to do: a network, its batches, and the loop that says what is right."""

from __future__ import annotations

import copy
import importlib
import re
import runpy
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler, StepLR

import fastclip

ROOT = Path(__file__).parents[1]

MAX_NORM = 0.5

HUGE = 1e25
"""Times a loss: the squares of its gradients leave float32; torch clips them to 0, fastclip to MAX_NORM."""

Batch = tuple[Tensor, Tensor]


def needs(name: str) -> ModuleType:
    """Import a package inside a test, so that only the process that tests it pays; skip without it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        pytest.skip(f"needs the package {error.name}")


def batches(num_batches: int = 8) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(num_batches * 4, 6, generator=generator)
    y = torch.randint(3, (num_batches * 4,), generator=generator)
    return list(zip(x.split(4), y.split(4), strict=True))


class Samples(torch.utils.data.Dataset[Batch]):
    """The same, sample by sample."""

    def __init__(self, given: list[Batch]) -> None:
        self.x, self.y = (torch.cat(parts) for parts in zip(*given, strict=True))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Batch:
        return self.x[index], self.y[index]


def loader(given: list[Batch]) -> torch.utils.data.DataLoader[Batch]:
    return torch.utils.data.DataLoader(Samples(given), batch_size=4)


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def loss_of(net: nn.Module, batch: Batch) -> Tensor:
    return cross_entropy(net(batch[0]).float(), batch[1])


def clipped(params: Any, **settings: Any) -> fastclip.ClippedOptimizer:
    return fastclip.ClippedOptimizer(AdamW(params, lr=0.05), **{"max_norm": MAX_NORM, **settings})


def schedule(optimizer: Optimizer) -> LRScheduler:
    return StepLR(optimizer, step_size=3, gamma=0.5)


def train(
    net: nn.Module,
    optimizer: Optimizer,
    given: Iterable[Batch],
    *,
    scheduler: LRScheduler | None = None,
    accumulate: int = 1,
    autocast: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> list[float]:
    """The loop that a trainer stands for; returns the norms of an optimizer that tells them."""
    norms = []
    for number, batch in enumerate(given, 1):
        with torch.autocast("cpu", autocast, enabled=autocast is not None, cache_enabled=False):
            loss = loss_of(net, batch) / accumulate
        (scaler.scale(loss) if scaler else loss).backward()
        if number % accumulate:
            continue
        if scaler:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        optimizer.zero_grad()
        if scheduler:
            scheduler.step()
        if last := getattr(optimizer, "last", None):
            norms.append(last.total_norm.item())
    return norms


def assert_same(net: nn.Module, want: nn.Module) -> None:
    for (name, param), expected in zip(net.named_parameters(), want.parameters(), strict=True):
        assert torch.equal(param, expected), f"{name} differs by {(param - expected).abs().max()}"


def reaches(step: Callable[[nn.Module], None]) -> bool:
    """Whether fastclip clips in a step of SGD with a rate of 1 on a loss times HUGE, clipped to MAX_NORM."""
    net = make_net()
    before = copy.deepcopy(list(net.parameters()))
    step(net)
    moved = torch.cat([(a - b).flatten() for a, b in zip(net.parameters(), before, strict=True)])
    if not moved.any():
        return False
    torch.testing.assert_close(moved.norm().item(), MAX_NORM, rtol=1e-5, atol=0)
    return True


def run_section(title: str) -> dict[str, Any]:
    """Run what docs/trainers.md tells a reader to type: the beginning of the page, then one section."""
    beginning, *sections = re.split(r"^## (.*)$", (ROOT / "docs/trainers.md").read_text("utf-8"), flags=re.M)
    text = dict(zip(sections[::2], sections[1::2], strict=True))[title]
    names: dict[str, Any] = {"__name__": "__main__"}
    torch.manual_seed(0)
    for number, code in enumerate(re.findall(r"^```python\n(.*?)^```$", beginning + text, re.M | re.S)):
        exec(compile(code, f"docs/trainers.md, {title}, block {number}", "exec"), names)
    return names


def run_example(name: str, monkeypatch: pytest.MonkeyPatch) -> float:
    """Run an example here, where its package is loaded already; returns the accuracy that it prints."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    accuracy: float = runpy.run_path(str(ROOT / "examples" / f"{name}.py"))["main"]()
    return accuracy
