"""What a monitor records, on which routes and under which circumstances, and what it costs in memory."""

from __future__ import annotations

import gc
import logging
import math
import tracemalloc
from pathlib import Path
from typing import Any

import monitor_cases as cases
import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import fastclip
from fastclip.optim import Outcome

PACKAGE = Path(fastclip.monitor.__file__).parent


class Collected:
    """A writer that keeps what it gets."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.num_blocks = 0

    def __call__(self, records: list[dict[str, Any]]) -> None:
        self.records += records
        self.num_blocks += 1

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [record for record in self.records if record["kind"] == kind]


@pytest.fixture
def collected() -> Collected:
    return Collected()


@pytest.fixture(params=[False, True], ids=["on_host", "as_on_device"])
def where(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With outcomes whose numbers are at hand, and with outcomes that would have to be waited for."""
    if request.param:
        monkeypatch.setattr(Outcome, "numbers", lambda self: None)
    return "device" if request.param else "host"


@pytest.mark.parametrize("attach", [False, True], ids=["wrapped", "attached"])
@pytest.mark.usefixtures("where")
def test_records_say_what_the_optimizer_did(attach: bool, collected: Collected) -> None:
    net, optimizer, source = cases.make(attach=attach, max_norm=2.0)
    expected = []
    with fastclip.Monitor(source, to=[collected], every=7) as monitor:
        for seed in range(20):
            loss = cases.backward(net, seed)
            optimizer.step()
            monitor.step(loss)
            last = source.last
            expected.append((float(loss.detach()), float(last.total_norm), float(last.clip_coef)))
    steps = collected.of("step")
    assert [record["step"] for record in steps] == list(range(1, 21))
    for name, values in zip(("loss", "norm", "coef"), zip(*expected, strict=True), strict=True):
        assert [record[name] for record in steps] == pytest.approx(values)
    assert {r["threshold"] for r in steps} == {2.0}
    assert not any(r["skipped"] for r in steps)
    clipped = [coef < 1 for *_, coef in expected]
    assert 0 < sum(clipped) < 20
    assert [r["clipped_share"] for r in steps] == pytest.approx(
        [sum(clipped[: n + 1]) / (n + 1) for n in range(20)]
    )
    assert collected.num_blocks == 3
    assert collected.records[0]["kind"] == "run"
    assert collected.records[0]["optimizer"] == "AdamW"


def test_hooks_record_what_no_one_calls_step_for(collected: Collected) -> None:
    net, optimizer, source = cases.make()
    with fastclip.Monitor(source, to=[collected]):
        for seed in range(3):
            cases.backward(net, seed)
            optimizer.step()
    assert [r["loss"] for r in collected.of("step")] == [None] * 3


def test_clipped_share_is_that_of_the_window(collected: Collected) -> None:
    made = cases.Norms()
    with fastclip.Monitor(made.optimizer, to=[collected], window=4):
        for norm in (2.0, 2.0, 0.5, 0.5, 0.5, 2.0):
            made.step(norm)
    assert [r["clipped_share"] for r in collected.of("step")] == [1, 1, 2 / 3, 2 / 4, 1 / 4, 1 / 4]


def test_a_threshold_that_changes_is_recorded(collected: Collected) -> None:
    made = cases.Norms()
    with fastclip.Monitor(made.optimizer, to=[collected]):
        for max_norm in (1.0, 0.5, math.inf):
            made.optimizer.max_norm = max_norm
            made.step(3.0)
    assert [r["threshold"] for r in collected.of("step")] == [1.0, 0.5, math.inf]
    assert [r["coef"] for r in collected.of("step")] == pytest.approx([1 / 3, 0.5 / 3, 1.0], rel=1e-5)


@pytest.mark.parametrize("threshold", [0.25, torch.tensor(0.25)], ids=["number", "tensor"])
@pytest.mark.usefixtures("where")
def test_the_outcome_s_own_threshold_counts(
    threshold: Any, collected: Collected, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = cases.Norms()
    last = type(made.optimizer).last.fget

    def with_threshold(optimizer: fastclip.ClippedOptimizer) -> Outcome | None:
        if (outcome := last(optimizer)) is not None:
            outcome.threshold = threshold
        return outcome

    monkeypatch.setattr(fastclip.ClippedOptimizer, "last", property(with_threshold))
    with fastclip.Monitor(made.optimizer, to=[collected]):
        made.step(3.0)
    assert collected.of("step")[0]["threshold"] == 0.25


@pytest.mark.parametrize("how", ["folded", "written", "plain", "attached", "scaled"])
@pytest.mark.usefixtures("where")
def test_norms_of_parameters_are_those_before_the_clip(how: str, collected: Collected) -> None:
    """However the step has left the gradients: as they were, clipped, or times a scale."""
    options = {"written": {"write_grads": True}, "plain": {"fused": False}, "attached": {"attach": True}}
    net, optimizer, source = cases.make(max_norm=0.1, **options.get(how, {}))
    scaler = fastclip.GradScaler("cpu", init_scale=1024.0, enabled=how == "scaled")
    expected: list[dict[str, float]] = []
    with fastclip.Monitor(source, to=[collected], model=net, per_parameter=True, every=4) as monitor:
        for seed in range(6):
            cases.backward(net, seed, scaler=scaler)
            norms = [norm / scaler.get_scale() for norm in fastclip.grad_norms(net.parameters()).tolist()]
            expected.append(dict(zip((name for name, _ in net.named_parameters()), norms, strict=True)))
            scaler.step(optimizer)
            scaler.update()
            monitor.step()
    for record, norms in zip(collected.of("step"), expected, strict=True):
        assert len(record["largest"]) == 5
        assert record["largest"] == pytest.approx({name: norms[name] for name in record["largest"]}, rel=1e-4)
        assert min(record["largest"].values()) >= 0.999 * min(sorted(norms.values())[1:])
    blocks = collected.of("parameters")
    assert [(block["first"], block["step"]) for block in blocks] == [(1, 4), (5, 6)]
    names = collected.of("run")[0]["parameters"]
    medians = {name: sum(sorted(n[name] for n in expected[:4])[1:3]) / 2 for name in names}
    assert blocks[0]["norms"] == pytest.approx(list(medians.values()), rel=1e-4)


def test_a_step_that_is_not_finite_is_told_at_once_and_on_record_when_told(tmp_path: Path) -> None:
    made = cases.Norms()

    def stop(record: dict[str, Any]) -> None:
        raise KeyboardInterrupt(record["step"])

    def train() -> None:
        with fastclip.Monitor(made.optimizer, tmp_path, on_warning=stop) as monitor:
            for norm in (1.0, math.nan, 1.0):
                made.step(norm)
                monitor.step(norm)

    with pytest.raises(KeyboardInterrupt, match="2"):
        train()
    assert [record["kind"] for record in cases.lines(tmp_path)] == ["run", "step", "nonfinite", "step"]


@pytest.mark.usefixtures("where")
def test_norms_of_parameters_in_every_third_step(collected: Collected) -> None:
    made = cases.Norms()
    with fastclip.Monitor(made.optimizer, to=[collected], model=made.model, per_parameter=3, every=4):
        for norm in (0.1, 9.0, 9.0, 0.2, math.nan, 9.0, 0.3):
            made.step(norm, 0.5)
    largest = {r["step"]: r["largest"]["h.a.weight"] for r in collected.of("step") if "largest" in r}
    assert largest == pytest.approx({1: 0.1, 4: 0.2, 7: 0.3})
    blocks = {block["first"]: block["norms"][0] for block in collected.of("parameters")}
    assert blocks[1] == pytest.approx(0.15)
    assert blocks[max(blocks)] == pytest.approx(0.3)
    assert [entry["name"] for entry in collected.of("nonfinite")[0].get("parameters", [])] in (
        [],
        ["h.a.weight"],
    )


@pytest.mark.usefixtures("where")
def test_a_parameter_without_a_gradient_has_no_norm(collected: Collected) -> None:
    made = cases.Norms()
    with fastclip.Monitor(made.optimizer, to=[collected], model=made.model, per_parameter=True):
        made.a.grad, made.b.grad = torch.full((1, 1), 3.0), None
        made.optimizer.step()
    assert collected.of("step")[0]["largest"] == pytest.approx({"h.a.weight": 3.0})
    block = collected.of("parameters")[0]["norms"]
    assert block[0] == pytest.approx(3.0)
    assert math.isnan(block[1])


@pytest.mark.usefixtures("where")
def test_update_ratio_is_measured_once_per_block(collected: Collected) -> None:
    parameter = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = fastclip.ClippedOptimizer(torch.optim.SGD([parameter], lr=0.5), max_norm=math.inf)
    with fastclip.Monitor(optimizer, to=[collected], update_ratio=True, every=3):
        for _ in range(7):
            parameter.data = torch.tensor([3.0, 4.0])
            parameter.grad = torch.tensor([0.0, 1.0])
            optimizer.step()
    ratios = {r["step"]: r["update_ratio"] for r in collected.of("step") if "update_ratio" in r}
    assert ratios == pytest.approx({1: 0.1, 4: 0.1, 7: 0.1})


def test_a_step_of_nan_is_recorded_with_names_and_what_came_before(
    collected: Collected, caplog: pytest.LogCaptureFixture
) -> None:
    net, optimizer, source = cases.make()
    seen: list[dict[str, Any]] = []
    with fastclip.Monitor(source, to=[collected], model=net, on_warning=seen.append, every=4):
        for seed in range(12):
            cases.backward(net, seed)
            if seed in (9, 10):
                net.h[0].weight.grad[0, :3] = math.nan
                net.h[0].bias.grad[0] = math.inf
            optimizer.step()
    (event,) = collected.of("nonfinite")  # of consecutive ones, the first
    norms = [r["norm"] for r in collected.of("step")]
    assert (event["step"], event["skipped"], event["num_parameters"]) == (10, True, 2)
    assert event["parameters"] == [
        {"name": "h.0.weight", "module": "h.0", "class": "Linear", "nan": 3, "inf": 0},
        {"name": "h.0.bias", "module": "h.0", "class": "Linear", "nan": 0, "inf": 1},
    ]
    assert event["before"] == norms[:9]
    assert seen == [event]
    assert [r["skipped"] for r in collected.of("step")][8:] == [False, True, True, False]
    (message,) = (record.getMessage() for record in caplog.records)
    assert message.startswith(
        "step 10 is not finite and was skipped (norm nan): h.0.weight of h.0 (Linear): 3 nan, 0 inf, and 1 "
        "more; the norms before: "
    )
    assert message.endswith(f", {norms[8]:.3g}")


@pytest.mark.parametrize("per_parameter", [False, True])
def test_on_a_device_norms_tell_which_parameters(
    per_parameter: bool,
    collected: Collected,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(Outcome, "numbers", lambda self: None)
    net, optimizer, source = cases.make()
    with fastclip.Monitor(source, to=[collected], model=net, per_parameter=per_parameter):
        for seed in range(3):
            cases.backward(net, seed)
            if seed == 1:
                net.h[1].bias.grad[0] = math.inf
            optimizer.step()
    (event,) = collected.of("nonfinite")
    assert event["step"] == 2
    if per_parameter:
        assert event["parameters"] == [
            {"name": "h.1.bias", "module": "h.1", "class": "Linear", "nan": None, "inf": None}
        ]
        assert "h.1.bias of h.1 (Linear); the norms before" in caplog.text
    else:
        assert "parameters" not in event
        assert "per_parameter=True tells which" in caplog.text


def test_parameters_without_a_model_have_the_optimizer_s_names(collected: Collected) -> None:
    net = torch.nn.Linear(2, 1)
    named = torch.optim.SGD(net.named_parameters(), lr=0.1)
    unnamed = torch.optim.SGD(net.parameters(), lr=0.1)
    found = []
    for plain in (named, unnamed):
        optimizer = fastclip.ClippedOptimizer(plain, 1.0)
        with fastclip.Monitor(optimizer, to=[collected]):
            net.weight.grad, net.bias.grad = torch.ones(1, 2), torch.full((1,), math.nan)
            optimizer.step()
        found.append(collected.of("nonfinite")[-1]["parameters"][0]["name"])
    assert found == ["bias", "parameter 1 of group 0"]


@pytest.mark.parametrize("scaler_class", [torch.amp.GradScaler, fastclip.GradScaler])
@pytest.mark.parametrize("attach", [False, True], ids=["wrapped", "attached"])
def test_a_scaler_s_skip(
    scaler_class: Any, attach: bool, collected: Collected, caplog: pytest.LogCaptureFixture
) -> None:
    """Recorded where the optimizer decides; a step that the scaler does not even call is no step."""
    caplog.set_level(logging.INFO, "fastclip.monitor")
    net, optimizer, source = cases.make(attach=attach)
    scaler = scaler_class("cpu", init_scale=4.0)
    losses = []
    with fastclip.Monitor(source, to=[collected], model=net) as monitor:
        for seed in range(4):
            loss = cases.backward(net, seed, scaler=scaler)
            if seed == 1:
                net.emb.weight.grad[0, 0] = math.inf
            scaler.step(optimizer)
            scaler.update()
            monitor.step(loss)
            losses.append(float(loss.detach()))
    steps = collected.of("step")
    if attach:
        assert [r["loss"] for r in steps] == pytest.approx([losses[0], *losses[2:]])
        assert not any(r["skipped"] for r in steps)
        return
    assert [r["loss"] for r in steps] == pytest.approx(losses)
    assert [r["skipped"] for r in steps] == [False, True, False, False]
    (event,) = collected.of("nonfinite")
    assert event["scaled"]
    assert event["parameters"][0]["name"] == "emb.weight"
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "under a GradScaler, and was skipped" in caplog.text


def test_the_loss_of_a_step_that_was_not_taken_is_left_out(collected: Collected) -> None:
    net, optimizer, source = cases.make()
    with fastclip.Monitor(source, to=[collected]) as monitor:
        for seed in range(4):
            loss = cases.backward(net, seed)
            if seed % 2:
                optimizer.step()
            monitor.step(loss)
            last = float(loss.detach())
    assert len(collected.of("step")) == 2
    assert collected.of("step")[-1]["loss"] == pytest.approx(last)


def test_a_step_that_raises_is_recorded(collected: Collected) -> None:
    net, optimizer, source = cases.make(nonfinite="raise")

    def train() -> None:
        with fastclip.Monitor(source, to=[collected], model=net):
            for seed in range(5):
                cases.backward(net, seed, poisoned=seed == 2)
                optimizer.step()

    with pytest.raises(RuntimeError, match="expected finite gradients"):
        train()
    assert [r["skipped"] for r in collected.of("step")] == [False, False, True]
    assert collected.of("nonfinite")[0]["step"] == 3


def test_a_closure_is_recorded(collected: Collected) -> None:
    net, optimizer, source = cases.make()
    with fastclip.Monitor(source, to=[collected]) as monitor:
        for seed in range(3):
            monitor.step(optimizer.step(lambda seed=seed: cases.backward(net, seed)))
    assert all(r["loss"] > 0 and r["norm"] > 0 for r in collected.of("step"))


def test_a_checkpoint_s_empty_step_is_none(collected: Collected) -> None:
    made = cases.Norms()  # by SGD, which has no state: torch takes such a step at every checkpoint
    with fastclip.Monitor(made.optimizer, to=[collected], update_ratio=True):
        get_optimizer_state_dict(made.model, made.optimizer)
        made.step(1.0)
        made.optimizer.zero_grad()
        get_optimizer_state_dict(made.model, made.optimizer)
    assert [r["norm"] for r in collected.of("step")] == [1.0]


def test_closing_takes_the_hooks_off(collected: Collected) -> None:
    made = cases.Norms()
    monitor = fastclip.Monitor(made.optimizer, to=[collected])
    made.step(1.0)
    monitor.close()
    monitor.close()
    made.step(1.0)
    assert len(collected.of("step")) == 1
    with pytest.raises(RuntimeError, match=r"Monitor\.step: this monitor is closed"):
        monitor.step(0.0)


def test_a_handle_that_is_removed_records_no_more(collected: Collected) -> None:
    net, optimizer, handle = cases.make(attach=True)
    with fastclip.Monitor(handle, to=[collected]):
        for seed in range(4):
            cases.backward(net, seed)
            optimizer.step()
            if seed == 1:
                handle.remove()
    assert len(collected.of("step")) == 2
    with pytest.raises(ValueError, match="was removed from its optimizer"):
        fastclip.Monitor(handle, to=[])


@pytest.mark.usefixtures("where")
def test_memory_does_not_grow_with_the_steps(tmp_path: Path) -> None:
    made = cases.Norms()
    options = {"model": made.model, "every": 10, "window": 10, "per_parameter": True, "update_ratio": True}
    with fastclip.Monitor(made.optimizer, tmp_path, **options) as monitor:

        def held_after(count: int) -> int:
            for _ in range(count):
                made.step(1.0, 1.0)
                monitor.step(1.0)
            gc.collect()
            own = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, f"{PACKAGE}/*")])
            return sum(trace.size for trace in own.traces)

        tracemalloc.start()
        try:
            before = held_after(100)
            grown = held_after(400) - before
        finally:
            tracemalloc.stop()
    assert grown < 4000, "a float per step would be 9600 bytes"


def wrong(**options: Any) -> fastclip.Monitor:
    return fastclip.Monitor(cases.Norms().optimizer, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "Monitor: every=0; expected at least 1"),
        ({"window": -1}, "Monitor: window=-1; expected at least 1"),
        ({"per_parameter": -1}, "Monitor: per_parameter=-1; expected at least 0"),
        ({}, "Monitor: to='jsonl' without a run; expected a directory"),
        ({"to": ["wandb"]}, "Monitor: to='wandb'; expected one of jsonl, csv, tensorboard, or a callable"),
    ],
)
def test_an_argument_that_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrong(**options)


def test_what_is_no_clipped_optimizer_is_refused() -> None:
    net = torch.nn.Linear(1, 1)
    with pytest.raises(TypeError, match=r"got a SGD; expected a ClippedOptimizer or what fastclip\.attach"):
        fastclip.Monitor(torch.optim.SGD(net.parameters(), lr=0.1), to=[])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"Monitor: to='csv'; expected a list: to=\['csv'\]"):
        wrong(to="csv")
    with pytest.raises(TypeError, match="to has a int; expected names and callables"):
        wrong(to=[3])
