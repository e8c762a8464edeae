"""The state of a first step on a device, for which torch's meta device stands in."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch.optim import SGD, AdamW, Optimizer

from fastclip.optim.native import state
from fastclip.optim.outcome import Outcome, Tally


def on_meta(count: int = 2) -> list[torch.nn.Parameter]:
    params = [torch.nn.Parameter(torch.zeros(3, 2, device="meta")) for _ in range(count)]
    for param in params:
        param.grad = torch.zeros_like(param)
    return params


def test_counters_are_made_on_the_device_and_all_of_it_is_taken_back() -> None:
    params = on_meta()
    optimizer = AdamW(params, amsgrad=True)
    made = state.ready_on_device(optimizer, params[:1], [])
    assert made == params[:1]
    assert {name: t.device.type for name, t in optimizer.state[params[0]].items()} == {
        "step": "meta",
        "exp_avg": "meta",
        "exp_avg_sq": "meta",
        "max_exp_avg_sq": "meta",
    }
    state.settle_first_step(optimizer, made, Outcome.on_cpu(1.0, 1.0, False, torch.float32))
    assert list(optimizer.state) == params[:1]
    state.settle_first_step(optimizer, made, Outcome.on_cpu(1.0, 1.0, True, torch.float32))
    assert not optimizer.state


def test_counters_of_every_dtype_are_moved_and_keep_it() -> None:
    params = on_meta(3)
    optimizer = AdamW(params)
    state.make_state(optimizer, params)
    optimizer.state[params[1]]["step"] = torch.tensor(7.0, dtype=torch.float64)
    state.ready_on_device(optimizer, [], params)
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


def test_counting_changes_the_counts_in_place() -> None:
    tally = Tally()
    counts = tally._counts
    for skipped in (False, True, True):
        tally.add(Outcome.on_cpu(3.0, 0.5, skipped, torch.float32))
    assert tally._counts is counts
    assert vars(tally.stats()) == {
        "steps": 3,
        "clipped": 1,
        "skipped": 2,
        "consecutive_skips": 2,
        "largest_norm": 3.0,
    }
