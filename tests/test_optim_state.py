"""The state of a first step on a device, for which torch's meta device stands in."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch.optim import SGD, AdamW, Optimizer

from fastclip.backends.step import Unready
from fastclip.optim.native import state
from fastclip.optim.outcome import Outcome, Stats, Tally


def on_meta(count: int = 2) -> list[torch.nn.Parameter]:
    params = [torch.nn.Parameter(torch.zeros(3, 2, device="meta")) for _ in range(count)]
    for param in params:
        param.grad = torch.zeros_like(param)
    return params


def test_counters_are_made_on_the_device_and_all_of_it_is_taken_back() -> None:
    params = on_meta()
    optimizer = AdamW(params, amsgrad=True)
    made = state.make_ready(optimizer, Unready(params[:1], []))
    assert made == params[:1]
    assert {name: t.device.type for name, t in optimizer.state[params[0]].items()} == {
        "step": "meta",
        "exp_avg": "meta",
        "exp_avg_sq": "meta",
        "max_exp_avg_sq": "meta",
    }
    state.discard_state(optimizer, made)
    assert not optimizer.state


def test_counters_of_every_dtype_are_moved_and_keep_it() -> None:
    params = on_meta(3)
    optimizer = AdamW(params)
    for param in params:
        optimizer.state[param] = {"step": torch.tensor(0.0)}
    optimizer.state[params[1]]["step"] = torch.tensor(7.0, dtype=torch.float64)
    state.make_ready(optimizer, Unready([], params))
    counters = [optimizer.state[param]["step"] for param in params]
    assert [c.device.type for c in counters] == ["meta"] * 3
    assert [c.dtype for c in counters] == [torch.float32, torch.float64, torch.float32]
    assert {c.shape for c in counters} == {torch.Size([])}


def test_moved_counters_keep_their_values() -> None:
    params = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    optimizer = AdamW(params)
    for number, param in enumerate(params):
        optimizer.state[param] = {"step": torch.tensor(float(number))}
    state.move_counters(optimizer, params)
    assert [optimizer.state[param]["step"].item() for param in params] == [0.0, 1.0, 2.0]


@pytest.mark.parametrize(
    ("options", "moved"), [({}, True), ({"fused": True}, False), ({"capturable": True}, False)]
)
def test_a_checkpoint_has_counters_where_torch_has_them(options: dict[str, bool], moved: bool) -> None:
    param = torch.nn.Parameter(torch.zeros(2))
    optimizer = AdamW([param], **options)
    on_cpu = torch.tensor(5.0)
    on_device = SimpleNamespace(device=torch.device("cuda"), cpu=lambda: on_cpu)
    optimizer.state[param] = {"step": on_device, "exp_avg": torch.zeros(2)}
    saved = state.as_torch_keeps_it(optimizer, optimizer.state_dict())
    assert saved["state"][0]["step"] is (on_cpu if moved else on_device)
    assert optimizer.state[param]["step"] is on_device


@pytest.mark.parametrize("kind", [SGD, AdamW])
def test_a_checkpoint_without_counters_on_a_device_is_left_alone(kind: type[Optimizer]) -> None:
    param = torch.nn.Parameter(torch.zeros(2))
    param.grad = torch.ones(2)
    optimizer = kind([param], lr=0.1)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    torch.testing.assert_close(state.as_torch_keeps_it(optimizer, optimizer.state_dict()), before)


def test_on_a_device_the_counts_are_changed_in_place_and_agree_with_the_hosts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps = [
        (3.0, 0.5, False),
        (0.5, 1.0, False),
        (5.0, 0.2, False),
        (math.inf, 0.0, True),
        (math.nan, math.nan, True),
    ]
    outcomes = [Outcome.of_numbers(*step, torch.float32) for step in steps]
    on_host, on_device = Tally(), Tally()
    for outcome in outcomes:
        on_host.add(outcome)
    monkeypatch.setattr(Outcome, "numbers", lambda self: None)
    on_device.add(outcomes[0])
    counts = on_device._counts
    for outcome in outcomes[1:]:
        on_device.add(outcome)
    assert on_device._counts is counts
    assert on_device.stats() == on_host.stats() == Stats(5, 2, 2, 2, 5.0)
