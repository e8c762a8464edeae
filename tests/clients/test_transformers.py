"""Clipping under the transformers Trainer: the same bits as in a loop of one's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import client_cases as client
import pytest
import torch
from torch.optim import SGD, AdamW, Optimizer

import fastclip


@pytest.fixture(scope="module")
def transformers() -> ModuleType:
    package = client.needs("transformers")
    client.needs("accelerate")
    package.logging.set_verbosity_error()
    return package


class Net(torch.nn.Module):
    """What a Trainer takes for a model: a loss among its outputs."""

    def __init__(self, factor: float = 1.0, net: torch.nn.Module | None = None) -> None:
        super().__init__()
        self.net = net or client.make_net()
        self.factor = factor

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": client.loss_of(self.net, (x, labels)) * self.factor}


class Clipped(fastclip.ClippedOptimizer):
    """For those who make an optimizer of parameters and options by one call."""

    def __init__(self, params: Any, lr: float, max_norm: float) -> None:
        super().__init__(AdamW(params, lr=lr), max_norm)


def samples(given: list[client.Batch]) -> list[dict[str, torch.Tensor]]:
    return [{"x": x, "labels": y} for x, y in client.Samples(given)]


def trainer(
    transformers: ModuleType,
    folder: Path,
    model: Net,
    given: list[client.Batch] | None = None,
    *,
    kind: type[Any] | None = None,
    **options: Any,
) -> Any:
    """A Trainer that keeps the order of the samples; what is no argument of it is one of its arguments'."""
    own = {name: options.pop(name) for name in ("optimizers", "optimizer_cls_and_kwargs") if name in options}
    arguments = transformers.TrainingArguments(
        **{
            "output_dir": str(folder),
            "use_cpu": True,
            "per_device_train_batch_size": 4,
            "num_train_epochs": 1,
            "learning_rate": 0.05,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "train_sampling_strategy": "sequential",
            "dataloader_pin_memory": False,
            **options,
        }
    )
    trainer = (kind or transformers.Trainer)(
        model=model, args=arguments, train_dataset=samples(given or client.batches()), **own
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def loop(epochs: int = 1, **options: Any) -> tuple[Any, fastclip.ClippedOptimizer, list[float]]:
    net = client.make_net()
    optimizer = client.clipped(net.parameters())
    return net, optimizer, client.train(net, optimizer, client.batches() * epochs, **options)


def logged(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def clipped_of(trainer: Any) -> Any:
    return trainer.optimizer.optimizer


@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"gradient_accumulation_steps": 2}], ids=str)
def test_train(transformers: ModuleType, tmp_path: Path, options: dict[str, Any]) -> None:
    net, optimizer, norms = loop(
        autocast=torch.bfloat16 if "bf16" in options else None,
        accumulate=options.get("gradient_accumulation_steps", 1),
    )
    model = Net()
    train = trainer(
        transformers, tmp_path, model, optimizers=(client.clipped(model.parameters()), None), **options
    )
    train.train()
    client.assert_same(model.net, net)
    assert clipped_of(train).stats() == optimizer.stats()
    assert optimizer.stats().clipped > 0
    # With max_grad_norm=0 the Trainer measures the gradients that the optimizer is about to clip.
    assert logged(train, "grad_norm") == pytest.approx(norms, rel=1e-5)


def test_the_optimizer_that_the_trainer_makes_can_be_wrapped(
    transformers: ModuleType, tmp_path: Path
) -> None:
    class Clipping(transformers.Trainer):  # type: ignore[misc, name-defined]
        def create_optimizer(self, model: Any = None) -> Optimizer:
            if self.optimizer is None:
                self.optimizer = fastclip.ClippedOptimizer(super().create_optimizer(model), client.MAX_NORM)
            return self.optimizer

    train = trainer(
        transformers,
        tmp_path,
        Net(),
        kind=Clipping,
        weight_decay=0.1,
        warmup_steps=2,
        lr_scheduler_type="linear",
    )
    train.train()
    optimizer = clipped_of(train)
    assert optimizer.route == "native"
    assert (optimizer.stats().steps, optimizer.stats().clipped > 0) == (8, True)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert logged(train, "learning_rate")[:3] == pytest.approx([0.0, 0.025, 0.05], rel=1e-6)


def test_its_arguments_can_be_given(transformers: ModuleType, tmp_path: Path) -> None:
    net = client.make_net()
    weights, biases = ([p for p in net.parameters() if p.dim() == dim] for dim in (2, 1))
    groups = [
        {"params": params, "weight_decay": 0.0} for params in (weights, biases)
    ]  # as the Trainer makes them
    optimizer = client.clipped(groups)
    client.train(net, optimizer, client.batches())
    model = Net()
    given = (Clipped, {"lr": 0.05, "max_norm": client.MAX_NORM})
    train = trainer(transformers, tmp_path, model, optimizer_cls_and_kwargs=given)
    train.train()
    client.assert_same(model.net, net)
    assert clipped_of(train).stats() == optimizer.stats()


def test_the_norm_of_the_step_is_logged(transformers: ModuleType, tmp_path: Path) -> None:
    class Logging(transformers.Trainer):  # type: ignore[misc, name-defined]
        def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            last = self.optimizer.optimizer.last
            super().log({**logs, "norm": last.total_norm.item()}, *args, **kwargs)

    norms = loop()[2]
    model = Net()
    optimizer = client.clipped(model.parameters())
    train = trainer(transformers, tmp_path, model, optimizers=(optimizer, None), kind=Logging)
    train.train()
    assert logged(train, "norm")[:-1] == norms  # and a summary at the end


@pytest.mark.parametrize("attached", [False, True], ids=["wrapped", "attached"])
def test_resume_has_the_same_bits(transformers: ModuleType, tmp_path: Path, attached: bool) -> None:
    def run(**options: Any) -> tuple[Net, Any, Any]:
        model = Net()
        inner = AdamW(model.parameters(), lr=0.05)
        counted: Any = fastclip.attach(inner, client.MAX_NORM) if attached else None
        optimizer = inner if attached else fastclip.ClippedOptimizer(inner, client.MAX_NORM)
        train = trainer(
            transformers,
            tmp_path,
            model,
            optimizers=(optimizer, None),
            num_train_epochs=2,
            save_strategy="steps",
            save_steps=10,
            lr_scheduler_type="linear",
        )
        train.train(**options)
        return model, (counted or optimizer).stats(), train

    whole, stats, _ = run()
    checkpoint = tmp_path / "checkpoint-10"
    assert torch.load(checkpoint / "optimizer.pt", weights_only=True)["fastclip"]["steps"] == 10
    resumed, resumed_stats, train = run(resume_from_checkpoint=str(checkpoint))
    assert len(logged(train, "loss")) == 16
    client.assert_same(resumed, whole)
    assert resumed_stats == stats
    assert (stats.steps, stats.clipped > 0) == (16, True)


def test_patch_torch_reaches_the_trainer(transformers: ModuleType, tmp_path: Path) -> None:
    norms: list[float] = []

    def step_with(max_grad_norm: float) -> Callable[[torch.nn.Module], None]:
        def step(net: torch.nn.Module) -> None:
            optimizer = SGD(net.parameters(), lr=1.0)
            train = trainer(
                transformers,
                tmp_path,
                Net(client.HUGE, net),
                client.batches(1),
                optimizers=(optimizer, None),
                max_grad_norm=max_grad_norm,
            )
            train.train()
            norms.extend(logged(train, "grad_norm"))

        return step

    assert not client.reaches(step_with(client.MAX_NORM))
    with fastclip.patch_torch():
        assert client.reaches(step_with(client.MAX_NORM))
    assert norms[0] == float("inf")
    assert client.HUGE / 10 < norms[1] < client.HUGE * 10


def test_page(transformers: ModuleType) -> None:
    names = client.run_section("transformers")
    assert clipped_of(names["trainer"]).stats().steps == 16
    assert "clip_fraction" in names["trainer"].state.log_history[0]


def test_example(transformers: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert client.run_example("transformers_trainer", monkeypatch) > 0.92
