"""Optimizers to wrap, the steps that they take, and how far two ways to take them may be apart."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from fastclip import ClippedOptimizer
from fastclip.optim import native
from fastclip.optim.outcome import Outcome, Tally
from fastclip.optim.settings import Amp, Settings

MAX_NORM = 60.0

SHAPES = ((7, 5), (), (33, 50))

OPTIONS: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "adamw": (AdamW, {"lr": 1e-2}),
    "adamw_betas_eps": (AdamW, {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}),
    "adamw_beta1_zero": (AdamW, {"lr": 1e-2, "betas": (0.0, 0.9)}),
    "adamw_amsgrad": (AdamW, {"lr": 1e-2, "amsgrad": True}),
    "adamw_maximize": (AdamW, {"lr": 1e-2, "maximize": True}),
    "adamw_tensor_lr": (AdamW, {"lr": torch.tensor(1e-2, dtype=torch.float64)}),
    "adam": (Adam, {"lr": 1e-2}),
    "adam_coupled_decay": (Adam, {"lr": 1e-2, "weight_decay": 0.1}),
    "adam_amsgrad_maximize": (Adam, {"lr": 1e-2, "amsgrad": True, "maximize": True, "weight_decay": 0.1}),
    "sgd": (SGD, {"lr": 0.1}),
    "sgd_decay": (SGD, {"lr": 0.1, "weight_decay": 0.1}),
    "sgd_momentum": (SGD, {"lr": 0.1, "momentum": 0.9}),
    "sgd_dampening": (SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    "sgd_nesterov": (SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "sgd_maximize": (SGD, {"lr": 0.1, "momentum": 0.9, "maximize": True}),
    "sgd_tensor_lr": (SGD, {"lr": torch.tensor(0.1, dtype=torch.float64), "momentum": 0.9}),
}


def parameters(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[torch.nn.Parameter]:
    """Normal parameters of SHAPES without gradients."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        for shape in SHAPES
    ]


def twins(params: list[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    """Parameters of the same values."""
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


def make(option: str, params: list[torch.nn.Parameter], **more: Any) -> Optimizer:
    """The optimizer of one of OPTIONS."""
    kind, options = OPTIONS[option]
    return kind(params, **copy.deepcopy(options), **more)


def gradients(num_steps: int, seed: int = 1) -> Iterator[list[Tensor]]:
    """float64 gradients for each step, of norms about 41, 123, 411 and 20: MAX_NORM clips half of them."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(num_steps):
        size = (1.0, 3.0, 10.0, 0.5)[step % 4]
        yield [torch.randn(shape, generator=generator, dtype=torch.float64) * size for shape in SHAPES]


def give(params: list[torch.nn.Parameter], grads: list[Tensor]) -> None:
    """Set each `.grad`, rounded to the dtype of its parameter and beside it."""
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.to(param.device, param.dtype, copy=True)


def with_ones(*params: Tensor) -> list[torch.nn.Parameter]:
    """torch.nn.Parameters with gradients, all ones."""
    listed = [p if isinstance(p, torch.nn.Parameter) else torch.nn.Parameter(p) for p in params]
    for param in listed:
        param.grad = torch.ones_like(param)
    return listed


def folded(optimizer: Optimizer, **settings: Any) -> ClippedOptimizer:
    """The optimizer, wrapped, whose steps must be taken by kernels that clip on the way."""
    return ClippedOptimizer(optimizer, **{"max_norm": MAX_NORM, "fused": True, **settings})


def plain(optimizer: Optimizer, **settings: Any) -> ClippedOptimizer:
    """fastclip's clip, then torch's step."""
    return folded(optimizer, **{"fused": False, **settings})


def scaled_step(optimizer: Optimizer, amp: Amp, **settings: Any) -> Outcome:
    """A step whose scaler keeps scale and verdict on the device, which the wrapper reads itself on a CPU."""
    tally = Tally()
    outcome = native.step(optimizer, Settings(**{"max_norm": MAX_NORM, **settings}), amp, tally, None)
    assert isinstance(outcome, Outcome), outcome
    assert tally.stats().clipped == int(not bool(outcome.skipped) and float(outcome.clip_coef) < 1)
    return outcome


def loss_of(params: list[torch.nn.Parameter], grads: list[Tensor]) -> Tensor:
    """A loss whose gradients are `grads`."""
    return sum(((p * g.to(p.dtype)).sum() for p, g in zip(params, grads, strict=True)), torch.zeros(()))


def snapshot(params: list[torch.nn.Parameter], optimizer: Optimizer) -> list[Any]:
    """Parameters and state as they are, to compare with later."""
    return [copy.deepcopy([p.detach() for p in params]), copy.deepcopy(optimizer.state_dict()["state"])]


def assert_same(before: list[Any], after: list[Any]) -> None:
    """Compare two snapshots, bit by bit."""
    torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)
