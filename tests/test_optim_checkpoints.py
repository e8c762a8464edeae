"""Clipped optimizers through torch.distributed.checkpoint: state and counters, in and out of plain torch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optim_cases as cases
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from strategy_cases import REMEMBERING, STRATEGIES
from torch import nn
from torch.distributed.checkpoint import state_dict as dsd
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from fastclip import ClippedOptimizer, attach, strategies
from fastclip.optim import checkpoints
from fastclip.strategies import Gradients, packing

KINDS: dict[str, Callable[..., Optimizer]] = {
    "adamw": lambda p: AdamW(p, lr=1e-2, weight_decay=0.1),
    "adam_fused": lambda p: Adam(p, lr=1e-2, fused=True, weight_decay=0.1),
    "sgd": lambda p: SGD(p, lr=0.1, weight_decay=0.1),
    "sgd_momentum": lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "rmsprop": lambda p: RMSprop(p, lr=1e-2, momentum=0.9, weight_decay=0.1),
}

FORMS = {
    "nested": dsd.StateDictOptions(),
    "flat": dsd.StateDictOptions(flatten_optimizer_state_dict=True),
    "full": dsd.StateDictOptions(full_state_dict=True, cpu_offload=True),
    "rank0": dsd.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
}

every_kind = pytest.mark.parametrize("kind", KINDS)
every_form = pytest.mark.parametrize("form", FORMS)
# Without any state, torch does not know the device, and sets no full state of any optimizer.
settable = pytest.mark.parametrize(
    ("kind", "form"),
    [(k, f) for k in KINDS for f in FORMS if k != "sgd" or f in ("nested", "flat")],
)


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    """A process group of one, which some forms ask for."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Net(nn.Module):
    """Two layers, a bias that is frozen and a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.first.bias.requires_grad_(False)


def groups(net: Net) -> list[dict[str, Any]]:
    return [{"params": [net.first.bias, net.first.weight]}, {"params": [net.second.bias], "lr": 0.05}]


def make(kind: str, wrap: bool = True) -> tuple[Net, Any]:
    net = Net()
    optimizer = KINDS[kind](groups(net))
    return net, ClippedOptimizer(optimizer, 0.5) if wrap else optimizer


def train(net: Net, optimizer: Optimizer, steps: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.randn(5, 4, generator=generator)
        net.second(net.first(x)).square().mean().backward()
        optimizer.step()
    optimizer.zero_grad()


def bits(net: Net, optimizer: Any) -> list[Any]:
    inner = getattr(optimizer, "optimizer", optimizer)
    return copy.deepcopy([list(net.parameters()), inner.state_dict()])


def assert_same(before: list[Any], after: list[Any]) -> None:
    cases.assert_same(before, after)


@settable
def test_to_get_and_set_counts_nothing_and_changes_nothing(kind: str, form: str) -> None:
    net, optimizer = make(kind)
    train(net, optimizer, 3)
    before, stats = bits(net, optimizer), optimizer.stats()
    state = dsd.get_optimizer_state_dict(net, optimizer, options=FORMS[form])
    assert_same(before, bits(net, optimizer))
    assert optimizer.stats() == stats
    dsd.set_optimizer_state_dict(net, optimizer, copy.deepcopy(state), options=FORMS[form])
    assert_same(before, bits(net, optimizer))
    assert optimizer.stats() == stats


@settable
def test_state_and_counters_go_into_a_new_optimizer(kind: str, form: str) -> None:
    net, optimizer = make(kind)
    train(net, optimizer, 3)
    other_net, other = make(kind)
    model, state = dsd.get_state_dict(net, optimizer, options=FORMS[form])
    given = copy.deepcopy(state)
    dsd.set_state_dict(
        other_net,
        other,
        model_state_dict=copy.deepcopy(model),
        optim_state_dict=given,
        options=FORMS[form],
    )
    assert other.stats() == optimizer.stats()
    assert other.stats().steps == 3
    assert_same(bits(net, optimizer), bits(other_net, other))
    assert checkpoints.KEY not in str(other.optimizer.state_dict())
    for one_net, one in ((net, optimizer), (other_net, other)):
        train(one_net, one, 2, seed=1)
    assert_same(bits(net, optimizer), bits(other_net, other))
    assert other.stats() == optimizer.stats()


@settable
@pytest.mark.parametrize("to_torch", [True, False])
def test_in_and_out_of_plain_torch(kind: str, form: str, to_torch: bool) -> None:
    net, optimizer = make(kind, wrap=to_torch)
    train(net, optimizer, 3)
    other_net, other = make(kind, wrap=not to_torch)
    other_net.load_state_dict(net.state_dict())
    state = dsd.get_optimizer_state_dict(net, optimizer, options=FORMS[form])
    dsd.set_optimizer_state_dict(other_net, other, copy.deepcopy(state), options=FORMS[form])
    if not to_torch:
        assert other.stats().steps == 0
    for param, twin in zip(net.parameters(), other_net.parameters(), strict=True):
        entry, twin_entry = (dict(o.state.get(p, {})) for o, p in ((optimizer, param), (other, twin)))
        twin_entry.pop(checkpoints.KEY, None)  # which plain torch keeps, and leaves alone
        assert_same([entry], [twin_entry])
    train(other_net, other, 2, seed=1)


@every_kind
def test_a_new_optimizer_that_was_asked_trains_as_if_it_was_not(kind: str) -> None:
    asked_net, asked = make(kind)
    net, optimizer = make(kind)
    dsd.get_optimizer_state_dict(asked_net, asked)
    assert (asked.stats().steps, asked.last) == (0, None)
    assert_same([list(net.parameters())], [list(asked_net.parameters())])
    for group_of_asked, group_of_other in zip(asked.param_groups, optimizer.param_groups, strict=True):
        assert {k: v for k, v in group_of_asked.items() if k != "params"} == {
            k: v for k, v in group_of_other.items() if k != "params"
        }
    for one_net, one in ((asked_net, asked), (net, optimizer)):
        train(one_net, one, 3)
    assert_same(bits(net, optimizer), bits(asked_net, asked))
    assert asked.stats() == optimizer.stats()


@pytest.mark.parametrize("flat", [True, False])
@every_kind
def test_files(kind: str, flat: bool, tmp_path: Path) -> None:
    options = dsd.StateDictOptions(flatten_optimizer_state_dict=flat)
    net, optimizer = make(kind)
    train(net, optimizer, 3)
    dcp.save({"optim": dsd.get_optimizer_state_dict(net, optimizer, options=options)}, checkpoint_id=tmp_path)
    other_net, other = make(kind)
    other_net.load_state_dict(net.state_dict())
    loaded = {"optim": dsd.get_optimizer_state_dict(other_net, other, options=options)}
    dcp.load(loaded, checkpoint_id=tmp_path)
    dsd.set_optimizer_state_dict(other_net, other, loaded["optim"], options=options)
    assert other.stats() == optimizer.stats()
    assert_same(bits(net, optimizer), bits(other_net, other))


def with_strategy(name: str, kind: str = "adamw") -> tuple[Net, ClippedOptimizer]:
    net = Net()
    optimizer = KINDS[kind](groups(net))
    optimizer.param_groups[1]["max_norm"] = STRATEGIES[name]()
    return net, ClippedOptimizer(optimizer, STRATEGIES[name]())


@pytest.mark.parametrize("form", ["nested", "flat"])
@pytest.mark.parametrize("name", [name for name in REMEMBERING if name != "percentile"])
def test_a_strategy_goes_on_from_a_file(name: str, form: str, tmp_path: Path) -> None:
    """One for all groups but the second, and one for that; with few norms seen, and with none."""
    net, optimizer = with_strategy(name)
    for steps in (0, 7):
        train(net, optimizer, steps)
        path = tmp_path / str(steps)
        dcp.save(
            {"optim": dsd.get_optimizer_state_dict(net, optimizer, options=FORMS[form])}, checkpoint_id=path
        )
        other_net, other = with_strategy(name)
        train(other_net, other, 2, seed=5)  # which is forgotten
        other_net.load_state_dict(net.state_dict())
        loaded = {"optim": dsd.get_optimizer_state_dict(other_net, other, options=FORMS[form])}
        dcp.load(loaded, checkpoint_id=path)
        dsd.set_optimizer_state_dict(other_net, other, loaded["optim"], options=FORMS[form])
        for limit, twin in zip(limits(optimizer), limits(other), strict=True):
            assert_same([seen_by(limit)], [seen_by(twin)])
    for one_net, one in ((net, optimizer), (other_net, other)):
        train(one_net, one, 9, seed=1)
    for one, twin in zip(net.parameters(), other_net.parameters(), strict=True):
        assert_same([one, optimizer.state.get(one, {})], [twin, other.state.get(twin, {})])


def seen_by(strategy: strategies.Strategy) -> torch.Tensor:
    return torch.tensor(packing.packed(strategy, 4), dtype=torch.float64)


def limits(optimizer: ClippedOptimizer) -> list[Any]:
    return [optimizer.max_norm, optimizer.param_groups[1]["max_norm"]]


def test_what_grows_is_left_out_with_a_warning() -> None:
    net, optimizer = make("adamw")
    optimizer.max_norm = strategies.Skip(strategies.Percentile(20))
    train(net, optimizer, 3)
    with pytest.warns(UserWarning, match="Percentile.*cannot keep what grows"):
        state = dsd.get_optimizer_state_dict(net, optimizer)
    train(net, optimizer, 1)
    dsd.set_optimizer_state_dict(net, optimizer, state)
    assert optimizer.stats().steps == 3
    assert int(optimizer.max_norm.state_dict()["inner"]["size"]) == 4


@pytest.mark.parametrize(
    "other",
    [
        strategies.Percentile(40, window=16, warmup=3),
        strategies.MedianMAD(window=15, warmup=5),
        strategies.Skip(strategies.MedianMAD(window=16, warmup=5)),
    ],
    ids=repr,
)
def test_another_strategy_is_refused_and_nothing_changes(other: strategies.Strategy) -> None:
    net, optimizer = make("adamw")
    optimizer.max_norm = strategies.MedianMAD(window=16, warmup=5)
    train(net, optimizer, 6)
    state = dsd.get_optimizer_state_dict(net, optimizer)
    optimizer.max_norm = other
    before, stats = bits(net, optimizer), optimizer.stats()
    with pytest.raises(ValueError, match="the checkpoint is of another strategy"):
        dsd.set_optimizer_state_dict(net, optimizer, state)
    assert_same(before, bits(net, optimizer))
    assert optimizer.stats() == stats


def test_fewer_gradients_than_parameters_leave_places_empty() -> None:
    strategy = strategies.NormStabilised()
    strategy.decide(Gradients([], torch.tensor(1.0), norms=torch.tensor([0.6, 0.8])))
    row = packing.packed(strategy, 3)
    assert len(row) == len(packing.packed(strategies.NormStabilised(), 3))
    state, rest = packing.unpacked([*row, 5.0], strategies.NormStabilised(), 3)
    assert rest == [5.0]
    for name in ("mean", "square", "seen"):
        assert state[name].tolist() == strategy.state_dict()[name].tolist()
    with pytest.raises(ValueError, match="seen 2 gradients in a step; expected at most 1"):
        packing.packed(strategy, 1)


def test_files_of_plain_torch_need_a_partial_load(tmp_path: Path) -> None:
    net, plain = make("adamw", wrap=False)
    train(net, plain, 3)
    dcp.save({"optim": dsd.get_optimizer_state_dict(net, plain)}, checkpoint_id=tmp_path)
    other_net, other = make("adamw")
    loaded = {"optim": dsd.get_optimizer_state_dict(other_net, other)}
    dcp.load(loaded, checkpoint_id=tmp_path, planner=dcp.DefaultLoadPlanner(allow_partial_load=True))
    dsd.set_optimizer_state_dict(other_net, other, loaded["optim"])
    assert other.stats().steps == 0
    assert_same([plain.state_dict()["state"]], [other.optimizer.state_dict()["state"]])


@pytest.mark.parametrize("form", ["nested", "flat", "full"])
def test_sharded_parameters(form: str) -> None:
    def start() -> tuple[nn.Module, ClippedOptimizer]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        fully_shard(net, mesh=init_device_mesh("cpu", (1,)))
        return net, ClippedOptimizer(AdamW(net.parameters()), 0.1)

    net, optimizer = start()
    for _ in range(3):
        net(torch.ones(3, 4)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    other_net, other = start()
    options = FORMS[form]
    model, state = dsd.get_state_dict(net, optimizer, options=options)
    dsd.set_state_dict(other_net, other, model_state_dict=model, optim_state_dict=state, options=options)
    assert other.stats() == optimizer.stats()
    assert other.stats().steps == 3
    for param, twin in zip(net.parameters(), other_net.parameters(), strict=True):
        for name, value in optimizer.state[param].items():
            torch.testing.assert_close(other.state[twin][name], value, rtol=0, atol=0)


def test_several_optimizers_keep_their_own() -> None:
    def start() -> tuple[Net, list[ClippedOptimizer]]:
        net = Net()
        return net, [
            ClippedOptimizer(SGD([net.first.weight], lr=0.1), 1.0),
            ClippedOptimizer(AdamW([net.second.bias]), 1.0),
        ]

    net, optimizers = start()
    train(net, optimizers[0], 3)
    train(net, optimizers[1], 5)
    for options in (FORMS["nested"], FORMS["flat"]):
        other_net, others = start()
        state = dsd.get_optimizer_state_dict(net, optimizers, options=options)
        dsd.set_optimizer_state_dict(other_net, others, state, options=options)
        assert [other.stats() for other in others] == [optimizer.stats() for optimizer in optimizers]


def test_with_hooks_and_schedulers_on_it() -> None:
    net, optimizer = make("adamw")
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("step"))
    torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    dsd.get_optimizer_state_dict(net, optimizer)
    assert (seen, optimizer.stats().steps) == (["step"], 0)


@every_form
def test_attached(form: str) -> None:
    net, optimizer = make("adamw", wrap=False)
    handle = attach(optimizer, 0.5)
    dsd.get_optimizer_state_dict(net, optimizer, options=FORMS[form])
    assert (handle.stats().steps, handle.last) == (0, None)
    train(net, optimizer, 3)
    before = bits(net, optimizer)
    state = copy.deepcopy(dsd.get_optimizer_state_dict(net, optimizer, options=FORMS[form]))
    assert_same(before, bits(net, optimizer))
    other_net, other = make("adamw", wrap=False)
    resumed = attach(other, 0.5)
    dsd.set_optimizer_state_dict(other_net, other, state, options=FORMS[form])
    # Flattened, torch carries only what the optimizer, which is torch's own, has names for.
    assert resumed.stats().steps == (0 if form == "flat" else 3)
    assert checkpoints.KEY not in other.state[other_net.first.weight]


def test_a_real_step_with_a_rate_and_gradients_of_zero_counts() -> None:
    optimizer = make("adamw")[1]
    for group_of in optimizer.param_groups:
        group_of["lr"] = 0.0
        for param in group_of["params"]:
            param.grad = torch.zeros_like(param)
    optimizer.step(closure=None)
    assert optimizer.stats().steps == 1
