"""Clipping under Lightning's Trainer and Fabric: the same bits as in a loop of one's own."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import client_cases as client
import pytest
import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

import fastclip

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*isinstance\\(treespec, LeafSpec\\).* is deprecated:FutureWarning",
    "ignore:.*does not have many workers",
    "ignore:.*exists and is not empty",
    "ignore:Precision 16-mixed is not supported by the model summary",
)

SCALERS = pytest.mark.parametrize("scaler", [torch.amp.GradScaler, fastclip.GradScaler])


@pytest.fixture(scope="module")
def pl() -> ModuleType:
    return client.needs("lightning.pytorch")


def module_of(
    pl: ModuleType, make: Callable[[Any], Optimizer], *, manual: bool = False, factor: float = 1.0
) -> Any:
    """A LightningModule that logs the norm and keeps what it logged."""

    class Module(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = client.make_net()
            self.automatic_optimization = not manual
            self.norms: list[float] = []
            self.poisoned: tuple[int, ...] = ()

        def training_step(self, batch: client.Batch, index: int) -> Tensor:
            loss = client.loss_of(self.net, batch) * factor
            if index in self.poisoned:
                loss = loss * float("inf")
            if manual:
                optimizer = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
                self.lr_schedulers().step()
            return loss

        def on_train_batch_end(self, *args: Any) -> None:
            last = getattr(self.optimizers(), "last", None)
            if last is not None:
                self.log("grad_norm", last.total_norm)
                self.norms.append(last.total_norm.item())

        def configure_optimizers(self) -> Any:
            optimizer = make(self.net.parameters())
            return [optimizer], [{"scheduler": client.schedule(optimizer), "interval": "step"}]

    return Module()


def trainer(pl: ModuleType, folder: Path, **options: Any) -> Any:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    rest = {"max_epochs": 1, "enable_checkpointing": False, "accelerator": "cpu", "default_root_dir": folder}
    return pl.Trainer(**{**quiet, **rest, **options})


def loop(**options: Any) -> tuple[Any, fastclip.ClippedOptimizer, list[float]]:
    net = client.make_net()
    optimizer = client.clipped(net.parameters())
    scheduler = client.schedule(optimizer)
    return net, optimizer, client.train(net, optimizer, client.batches(), scheduler=scheduler, **options)


@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
def test_fit(pl: ModuleType, tmp_path: Path, manual: bool) -> None:
    net, optimizer, norms = loop()
    module = module_of(pl, client.clipped, manual=manual)
    fit = trainer(pl, tmp_path)
    fit.fit(module, client.loader(client.batches()))
    client.assert_same(module.net, net)
    assert module.norms == norms
    assert module.optimizers().stats() == optimizer.stats()
    assert optimizer.stats().clipped > 0
    assert fit.logged_metrics["grad_norm"].item() == norms[-1]


def test_accumulated_gradients_are_clipped_once(pl: ModuleType, tmp_path: Path) -> None:
    """The rate is constant: Lightning counts a schedule in batches."""
    net = client.make_net()
    optimizer = client.clipped(net.parameters())
    client.train(net, optimizer, client.batches(), accumulate=2)
    module = module_of(pl, client.clipped)
    module.configure_optimizers = lambda: client.clipped(module.net.parameters())
    trainer(pl, tmp_path, accumulate_grad_batches=2).fit(module, client.loader(client.batches()))
    client.assert_same(module.net, net)
    assert module.optimizers().stats() == optimizer.stats()
    assert optimizer.stats().steps == 4


def test_bfloat16_mixed(pl: ModuleType, tmp_path: Path) -> None:
    net, optimizer, norms = loop(autocast=torch.bfloat16)
    module = module_of(pl, client.clipped)
    trainer(pl, tmp_path, precision="bf16-mixed").fit(module, client.loader(client.batches()))
    client.assert_same(module.net, net)
    assert (module.norms, module.optimizers().stats()) == (norms, optimizer.stats())


def test_bfloat16_parameters(pl: ModuleType, tmp_path: Path) -> None:
    module = module_of(pl, client.clipped)
    trainer(pl, tmp_path, precision="bf16-true").fit(module, client.loader(client.batches()))
    assert module.net[0].weight.dtype == torch.bfloat16
    assert module.optimizers().last.total_norm.dtype == torch.float32
    assert module.optimizers().route == "native"
    assert module.optimizers().stats().steps == 8


@SCALERS
@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
def test_float16_mixed_skips_what_overflows(
    pl: ModuleType, tmp_path: Path, scaler: type[torch.amp.GradScaler], manual: bool
) -> None:
    finals = []
    for poisoned in ((), (2,)):
        module = module_of(pl, client.clipped, manual=manual)
        module.poisoned = poisoned
        own = scaler("cpu", init_scale=1024.0)
        precision = pl.plugins.MixedPrecision("16-mixed", "cpu", scaler=own)
        trainer(pl, tmp_path, plugins=[precision]).fit(module, client.loader(client.batches()))
        finals.append((module.net, module.optimizers().stats(), own.get_scale()))
    net, optimizer, _ = loop(autocast=torch.float16, scaler=scaler("cpu", init_scale=1024.0))
    client.assert_same(finals[0][0], net)
    assert finals[0][1:] == (optimizer.stats(), 1024.0)
    assert (finals[1][1].steps, finals[1][1].skipped, finals[1][2]) == (8, 1, 512.0)
    assert all(param.isfinite().all() for param in finals[1][0].parameters())


def test_lightning_refuses_to_clip_what_a_clipped_optimizer_is_to_unscale(
    pl: ModuleType, tmp_path: Path
) -> None:
    precision = pl.plugins.MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))
    fit = trainer(pl, tmp_path, plugins=[precision], gradient_clip_val=1.0)
    with pytest.raises(RuntimeError, match=r"ClippedOptimizer, does not allow for gradient clipping"):
        fit.fit(module_of(pl, client.clipped), client.loader(client.batches()))


def test_a_threshold_set_through_lightnings_optimizer_holds(pl: ModuleType, tmp_path: Path) -> None:
    module = module_of(pl, client.clipped, manual=True)

    def lower(*args: Any) -> None:
        module.optimizers().max_norm = 1e-3

    module.on_train_start = lower
    trainer(pl, tmp_path).fit(module, client.loader(client.batches()))
    optimizer = module.optimizers()
    assert optimizer.max_norm == optimizer.optimizer.max_norm == 1e-3
    assert optimizer.last.clip_coef.item() == pytest.approx(1e-3 / optimizer.last.total_norm.item(), rel=1e-3)


@pytest.mark.parametrize("kind", ["wrapped", "attached"])
def test_resume_has_the_same_bits(pl: ModuleType, tmp_path: Path, kind: str) -> None:
    handles = []

    def make(params: Any) -> Optimizer:
        if kind == "wrapped":
            return client.clipped(params)
        optimizer = AdamW(params, lr=0.05)
        handles.append(fastclip.attach(optimizer, client.MAX_NORM))
        return optimizer

    def counted(module: Any) -> Any:
        return (module.optimizers() if kind == "wrapped" else handles[-1]).stats()

    whole = module_of(pl, make)
    trainer(pl, tmp_path, max_epochs=2).fit(whole, client.loader(client.batches()))
    whole_stats = counted(whole)
    first = module_of(pl, make)
    fit = trainer(pl, tmp_path, max_epochs=1)
    fit.fit(first, client.loader(client.batches()))
    fit.save_checkpoint(tmp_path / "half.ckpt")
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)
    assert saved["optimizer_states"][0]["fastclip"]["steps"] == 8
    resumed = module_of(pl, make)
    trainer(pl, tmp_path, max_epochs=2).fit(
        resumed, client.loader(client.batches()), ckpt_path=tmp_path / "half.ckpt"
    )
    client.assert_same(resumed.net, whole.net)
    assert counted(resumed) == whole_stats
    assert whole_stats.steps == 16


def test_attached(pl: ModuleType, tmp_path: Path) -> None:
    def make(params: Any) -> Optimizer:
        optimizer = AdamW(params, lr=0.05)
        handles.append(fastclip.attach(optimizer, client.MAX_NORM))
        return optimizer

    handles: list[fastclip.optim.AttachedClipping] = []
    net = client.make_net()
    optimizer = make(net.parameters())
    client.train(net, optimizer, client.batches(), scheduler=client.schedule(optimizer))
    module = module_of(pl, make)
    trainer(pl, tmp_path).fit(module, client.loader(client.batches()))
    client.assert_same(module.net, net)
    assert handles[0].stats() == handles[1].stats()
    assert handles[0].stats().clipped > 0


def test_patch_torch_reaches_the_trainer(pl: ModuleType, tmp_path: Path) -> None:
    def step(net: torch.nn.Module) -> None:
        module = module_of(pl, lambda params: SGD(params, lr=1.0), factor=client.HUGE)
        module.net = net
        trainer(pl, tmp_path, gradient_clip_val=client.MAX_NORM).fit(module, client.loader(client.batches(1)))

    assert not client.reaches(step)
    with fastclip.patch_torch():
        assert client.reaches(step)


@pytest.fixture(scope="module")
def fabric_of(pl: ModuleType) -> Callable[..., Any]:
    return lambda **options: client.needs("lightning.fabric").Fabric(accelerator="cpu", **options)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_fabric(fabric_of: Callable[..., Any], tmp_path: Path, precision: str) -> None:
    net, optimizer, norms = loop(autocast=torch.bfloat16 if precision == "bf16-mixed" else None)
    fabric = fabric_of(precision=precision)
    own = client.make_net()
    model, wrapped = fabric.setup(own, client.clipped(own.parameters()))
    scheduler = client.schedule(wrapped)
    found = []
    for batch in client.batches():
        fabric.backward(client.loss_of(model, batch))
        wrapped.step()
        wrapped.zero_grad()
        scheduler.step()
        found.append(wrapped.last.total_norm.item())
    client.assert_same(own, net)
    assert found == norms
    fabric.save(tmp_path / "saved.ckpt", {"model": model, "optimizer": wrapped})
    resumed = client.make_net()
    model, other = fabric.setup(resumed, client.clipped(resumed.parameters()))
    fabric.load(tmp_path / "saved.ckpt", {"model": model, "optimizer": other})
    assert other.stats() == optimizer.stats()
    client.assert_same(resumed, net)


def test_patch_torch_reaches_fabric(fabric_of: Callable[..., Any]) -> None:
    def step(net: torch.nn.Module) -> None:
        fabric = fabric_of()
        model, optimizer = fabric.setup(net, SGD(net.parameters(), lr=1.0))
        fabric.backward(client.loss_of(model, client.batches(1)[0]) * client.HUGE)
        fabric.clip_gradients(model, optimizer, max_norm=client.MAX_NORM, error_if_nonfinite=False)
        optimizer.step()

    assert not client.reaches(step)
    with fastclip.patch_torch():
        assert client.reaches(step)


def test_ours_unscales_once_by_way_of_lightnings_optimizer(pl: ModuleType, tmp_path: Path) -> None:
    module = module_of(pl, client.clipped, manual=True)
    scaler = fastclip.GradScaler("cpu", init_scale=1024.0)
    module.on_after_backward = lambda: scaler.unscale_(module.optimizers())
    precision = pl.plugins.MixedPrecision("16-mixed", "cpu", scaler=scaler)
    trainer(pl, tmp_path, plugins=[precision]).fit(module, client.loader(client.batches()))
    net, optimizer, norms = loop(autocast=torch.float16, scaler=fastclip.GradScaler("cpu", init_scale=1024.0))
    client.assert_same(module.net, net)
    assert (module.norms, module.optimizers().stats()) == (norms, optimizer.stats())


def test_page(pl: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for title, steps in (("Lightning", 4), ("Fabric", 8)):
        names = client.run_section(title)
        optimizer = names["optimizer"] if title == "Fabric" else names["model"].optimizers()
        assert optimizer.stats().steps == steps * (2 if title == "Lightning" else 1)


def test_example(pl: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert client.run_example("lightning_trainer", monkeypatch) > 0.93
