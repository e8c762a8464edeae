"""Clipping under accelerate's Accelerator: the same bits as in a loop of one's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import client_cases as client
import pytest
import torch
from torch.optim import SGD, AdamW

import fastclip


@pytest.fixture(scope="module")
def package() -> ModuleType:
    return client.needs("accelerate")


@pytest.fixture
def accelerate(package: ModuleType) -> Iterator[ModuleType]:
    """The package, whose singletons are as after its import."""
    yield package
    for state in (package.state.AcceleratorState, package.state.GradientState, package.state.PartialState):
        state._reset_state()


def train(
    accelerator: Any, net: torch.nn.Module, optimizer: Any, given: list[client.Batch], epochs: int = 1
) -> tuple[Any, Any, list[float]]:
    """The loop of accelerate's documentation without its line that clips."""
    scheduler = client.schedule(optimizer)
    model, optimizer, loader, scheduler = accelerator.prepare(net, optimizer, client.loader(given), scheduler)
    norms = []
    for _ in range(epochs):
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(client.loss_of(model, batch))
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                if accelerator.sync_gradients and hasattr(optimizer.optimizer, "last"):
                    norms.append(optimizer.optimizer.last.total_norm.item())
    return optimizer, scheduler, norms


def loop(**options: Any) -> tuple[Any, fastclip.ClippedOptimizer, list[float]]:
    net = client.make_net()
    optimizer = client.clipped(net.parameters())
    scheduler = client.schedule(optimizer)
    return net, optimizer, client.train(net, optimizer, client.batches(), scheduler=scheduler, **options)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_loop(accelerate: ModuleType, accumulate: int, precision: str) -> None:
    autocast = torch.bfloat16 if precision == "bf16" else None
    net, optimizer, norms = loop(accumulate=accumulate, autocast=autocast)
    own = client.make_net()
    accelerator = accelerate.Accelerator(
        cpu=True, gradient_accumulation_steps=accumulate, mixed_precision=precision
    )
    wrapped, scheduler, found = train(accelerator, own, client.clipped(own.parameters()), client.batches())
    client.assert_same(own, net)
    assert found == norms
    assert wrapped.optimizer.stats() == optimizer.stats()
    assert optimizer.stats().steps == 8 // accumulate
    assert wrapped.param_groups is wrapped.optimizer.optimizer.param_groups
    assert scheduler.get_last_lr() == [group["lr"] for group in optimizer.param_groups]


def test_what_accelerates_optimizer_sets_reaches_the_wrapped_one(accelerate: ModuleType) -> None:
    net = client.make_net()
    wrapped = accelerate.Accelerator(cpu=True).prepare(client.clipped(net.parameters()))
    for name, value in (
        ("param_groups", wrapped.param_groups),
        ("state", wrapped.state),
        ("defaults", {"lr": 1}),
    ):
        setattr(wrapped, name, value)
        assert getattr(wrapped.optimizer.optimizer, name) is value
    twins = {param: torch.nn.Parameter(param.detach().clone()) for param in net.parameters()}
    wrapped._switch_parameters(twins)
    assert wrapped.optimizer.optimizer.param_groups[0]["params"] == list(twins.values())


@pytest.mark.parametrize("unscale_first", [False, True])
@pytest.mark.parametrize("kind", [torch.amp.GradScaler, fastclip.GradScaler])
def test_scaler(accelerate: ModuleType, kind: type[torch.amp.GradScaler], unscale_first: bool) -> None:
    """accelerate has float16 on accelerators alone; a scaler of the CPU takes the same way through it."""
    finals = []
    for poisoned in (False, True):
        net = client.make_net()
        accelerator = accelerate.Accelerator(cpu=True)
        accelerator.scaler = kind("cpu", init_scale=1024.0)
        optimizer = accelerator.prepare(client.clipped(net.parameters()))
        for number, batch in enumerate(client.batches()):
            loss = client.loss_of(net, batch)
            accelerator.backward(loss * float("inf") if poisoned and number == 2 else loss)
            if unscale_first:
                accelerator.scaler.unscale_(optimizer.optimizer)
            optimizer.step()
            optimizer.zero_grad()
        finals.append((net, optimizer.optimizer.stats(), accelerator.scaler.get_scale()))
    want = client.make_net()
    expected = client.clipped(want.parameters())
    client.train(want, expected, client.batches(), scaler=kind("cpu", init_scale=1024.0))
    client.assert_same(finals[0][0], want)  # the scale is a power of 2, so nothing is rounded
    assert finals[0][1].steps == 8
    assert finals[0][2] == 1024.0
    assert (finals[1][1].steps, finals[1][1].skipped, finals[1][2]) == (8, 1, 512.0)
    assert all(param.isfinite().all() for param in finals[1][0].parameters())


@pytest.mark.parametrize("attached", [False, True], ids=["wrapped", "attached"])
def test_resume_has_the_same_bits(accelerate: ModuleType, tmp_path: Path, attached: bool) -> None:
    def start(folder: Path | None = None) -> tuple[Any, Any, Any, Any]:
        net = client.make_net()
        optimizer: Any = AdamW(net.parameters(), lr=0.05)
        counted: Any = fastclip.attach(optimizer, client.MAX_NORM) if attached else None
        if counted is None:
            counted = optimizer = fastclip.ClippedOptimizer(optimizer, client.MAX_NORM)
        accelerator = accelerate.Accelerator(cpu=True)
        net, optimizer = accelerator.prepare(net, optimizer)
        if folder:
            accelerator.load_state(folder)
        return net, optimizer, counted, accelerator

    def go(net: Any, optimizer: Any, accelerator: Any, given: list[client.Batch]) -> None:
        for batch in given:
            accelerator.backward(client.loss_of(net, batch))
            optimizer.step()
            optimizer.zero_grad()

    net, optimizer, counted, accelerator = start()
    go(net, optimizer, accelerator, client.batches()[:4])
    accelerator.save_state(tmp_path / "half")
    go(net, optimizer, accelerator, client.batches()[4:])
    resumed, optimizer, resumed_counted, accelerator = start(tmp_path / "half")
    assert resumed_counted.stats().steps == 4
    go(resumed, optimizer, accelerator, client.batches()[4:])
    client.assert_same(resumed, net)
    assert resumed_counted.stats() == counted.stats()
    assert counted.stats().clipped > 0


def test_patch_torch_reaches_the_accelerator(accelerate: ModuleType) -> None:
    def step(net: torch.nn.Module) -> None:
        accelerator = accelerate.Accelerator(cpu=True)
        model, optimizer = accelerator.prepare(net, SGD(net.parameters(), lr=1.0))
        accelerator.backward(client.loss_of(model, client.batches(1)[0]) * client.HUGE)
        accelerator.clip_grad_norm_(model.parameters(), client.MAX_NORM)
        optimizer.step()

    assert not client.reaches(step)
    with fastclip.patch_torch():
        assert client.reaches(step)


def test_page(accelerate: ModuleType) -> None:
    names = client.run_section("accelerate")
    assert names["clipped"].stats().steps == 4
    assert names["norm"] > 0


def test_example(
    accelerate: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert client.run_example("accelerate_loop", monkeypatch) > 0.93
    assert " 1 skipped" in capsys.readouterr().out
