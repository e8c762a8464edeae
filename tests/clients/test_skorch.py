"""Clipping under skorch's NeuralNet: the same bits as in a loop of one's own."""

from __future__ import annotations

import importlib
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import client_cases as client
import pytest
import torch
from sklearn.base import clone
from torch import nn
from torch.optim import LBFGS, SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import StepLR

import fastclip


@pytest.fixture(scope="module")
def skorch() -> Iterator[ModuleType]:
    package = client.needs("skorch")
    client.needs("skorch.callbacks")
    return package


class Clipped(fastclip.ClippedOptimizer):
    """What skorch makes an optimizer of: one call with parameters and options."""

    def __init__(self, params: Any, lr: float, max_norm: float = client.MAX_NORM, **options: Any) -> None:
        super().__init__(AdamW(params, lr=lr, **options), max_norm)


def net_of(skorch: ModuleType, optimizer: Any = Clipped, **options: Any) -> Any:
    return skorch.NeuralNet(
        **{
            "module": client.make_net,
            "criterion": nn.CrossEntropyLoss,
            "optimizer": optimizer,
            "lr": 0.05,
            "batch_size": 4,
            "max_epochs": 1,
            "train_split": None,
            "verbose": 0,
            **options,
        }
    )


def fit(net: Any, given: list[client.Batch] | None = None, *, partial: bool = False) -> Any:
    samples = client.Samples(given or client.batches())
    return (net.partial_fit if partial else net.fit)(samples.x, samples.y)


def test_fit(skorch: ModuleType) -> None:
    class RecordNorm(skorch.callbacks.Callback):  # type: ignore[misc, name-defined]
        def on_batch_end(self, net: Any, training: bool, **kwargs: Any) -> None:
            if training:
                net.history.record_batch("grad_norm", net.optimizer_.last.total_norm.item())

    schedule = skorch.callbacks.LRScheduler(StepLR, step_size=3, gamma=0.5, step_every="batch")
    fitted = fit(net_of(skorch, callbacks=[schedule, RecordNorm()]))
    net = client.make_net()
    optimizer = client.clipped(net.parameters())
    norms = client.train(net, optimizer, client.batches(), scheduler=client.schedule(optimizer))
    client.assert_same(fitted.module_, net)
    assert fitted.history[:, "batches", :, "grad_norm"] == [norms]
    assert fitted.optimizer_.stats() == optimizer.stats()
    assert optimizer.stats().clipped > 0


def test_clones_and_parameters(skorch: ModuleType) -> None:
    net = clone(net_of(skorch, optimizer__max_norm=0.25, optimizer__weight_decay=0.1)).initialize()
    assert net.optimizer_.max_norm == 0.25
    net.set_params(lr=0.5, optimizer__weight_decay=0.2)
    (group,) = net.optimizer_.optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (0.5, 0.2)


@pytest.mark.parametrize("way", ["files", "pickle"])
def test_resume_has_the_same_bits(skorch: ModuleType, tmp_path: Path, way: str) -> None:
    first = fit(net_of(skorch), client.batches()[:4])
    if way == "pickle":
        second = pickle.loads(pickle.dumps(first))
    else:
        files = {"f_params": tmp_path / "net.pt", "f_optimizer": tmp_path / "optimizer.pt"}
        first.save_params(**files)
        second = net_of(skorch).initialize()
        second.load_params(**files)
    assert second.optimizer_.stats() == first.optimizer_.stats()
    want = client.make_net()
    whole = client.clipped(want.parameters())
    client.train(want, whole, client.batches())
    fit(second, client.batches()[4:], partial=True)
    client.assert_same(second.module_, want)
    assert second.optimizer_.stats() == whole.stats()
    assert whole.stats().steps == 8


def test_lbfgs_evaluates_skorchs_closure_several_times(skorch: ModuleType) -> None:
    def make(params: Any, lr: float) -> fastclip.ClippedOptimizer:
        return fastclip.ClippedOptimizer(
            LBFGS([p for group in params for p in group["params"]], lr, max_iter=4), 1.0
        )

    net = fit(net_of(skorch, make, max_epochs=5, batch_size=-1))
    losses = net.history[:, "train_loss"]
    assert losses[-1] < losses[0]
    assert net.optimizer_.stats().steps == 5
    assert net.optimizer_.route == "plain"


def test_a_batch_that_is_not_finite_is_skipped(skorch: ModuleType) -> None:
    given = client.batches()
    given[3][0][:] = float("nan")
    net = fit(net_of(skorch), given)
    assert (net.optimizer_.stats().steps, net.optimizer_.stats().skipped) == (8, 1)
    assert all(param.isfinite().all() for param in net.module_.parameters())


def test_attached(skorch: ModuleType) -> None:
    handles = []

    def make(params: Any, lr: float) -> Optimizer:
        optimizer = AdamW(params, lr=lr)
        handles.append(fastclip.attach(optimizer, client.MAX_NORM))
        return optimizer

    want = client.make_net()
    client.train(want, make(want.parameters(), 0.05), client.batches())
    net = fit(net_of(skorch, make))
    client.assert_same(net.module_, want)
    assert handles[-1].stats() == handles[0].stats()
    assert handles[0].stats().clipped > 0


def step_of(skorch: ModuleType, module: Any) -> None:
    class HugeLoss(nn.CrossEntropyLoss):
        def forward(self, *args: Any) -> torch.Tensor:
            return super().forward(*args) * client.HUGE

    clipping = skorch.callbacks.GradientNormClipping(client.MAX_NORM)
    net = net_of(skorch, SGD, lr=1.0, module=module, criterion=HugeLoss, callbacks=[clipping])
    fit(net.initialize(), client.batches(1), partial=True)


def test_patch_torch_reaches_the_callback_that_bound_torchs_function_early(skorch: ModuleType) -> None:
    def step(net: nn.Module) -> None:
        step_of(skorch, net)

    assert not client.reaches(step)
    with fastclip.patch_torch():
        assert client.reaches(step)
    assert not client.reaches(step)


def test_patch_torch_reaches_a_callback_that_is_imported_later(skorch: ModuleType) -> None:
    name = "skorch.callbacks.regularization"
    early = sys.modules.pop(name)
    try:
        with fastclip.patch_torch():
            late = importlib.import_module(name)
            assert late.clip_grad_norm_ is fastclip.clip_grad_norm_
        # Which keeps it: nobody can tell it from a module that imports fastclip's by its own name.
        assert late.clip_grad_norm_ is fastclip.clip_grad_norm_
    finally:
        sys.modules[name] = early


def test_page(skorch: ModuleType) -> None:
    names = client.run_section("skorch")
    assert names["search"].optimizer_.max_norm == 0.5
    assert names["search"].optimizer_.stats().steps == 10
