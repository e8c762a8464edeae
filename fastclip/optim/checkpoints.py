"""Where fastclip's counters stand in a checkpoint, and how they pass through torch.distributed.checkpoint.

In a `state_dict` they have a key of their own beside `state` and `param_groups`. torch.distributed.checkpoint
carries nothing but these two and, flattened, of a parameter's state only the names that it has by then, each
as large as it is by then. So there the counters, and what strategies have seen, stand in a row in the state
of the first parameter that has any; loading takes them out again.
FullyShardedDataParallel (not `fully_shard`) leaves no place for them: there they start from nothing.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastclip.optim.callers import is_checkpointing
from fastclip.optim.deciding import GROUP_KEY, clippers, strategies_of
from fastclip.optim.outcome import Stats, Tally
from fastclip.optim.settings import Settings
from fastclip.strategies import Strategy
from fastclip.strategies.packing import packed, unpacked_all

KEY = "fastclip"
"""Under which the counters stand."""

STRATEGIES = "strategies"
"""Under which, beside the counters, strategies have theirs, by the names that `deciding` gives them."""

_ROW = "row"
"""The same in what was taken out of a parameter's state, as `packing` has it: one after the other."""

_NAMES = tuple(field.name for field in fields(Stats))


class StateWithCounters(defaultdict[Tensor, Any]):
    """An optimizer's state as torch.distributed.checkpoint is to see it: to read the names in it."""

    def __init__(self, state: dict[Tensor, Any]) -> None:
        """Take the optimizer's own."""
        super().__init__(dict, state)

    def __getitem__(self, param: Tensor) -> dict[str, Any]:
        """Return the state of a parameter with a place for the counters."""
        return {**self.get(param, {}), KEY: {}}


def with_counters(
    optimizer: Optimizer, state_dict: dict[str, Any], tally: Tally, settings: Settings
) -> dict[str, Any]:
    """Return an optimizer's `state_dict` with the counters and what strategies have seen.

    torch.distributed.checkpoint has no place for what grows, of which a warning says that it is left out.
    """
    if not is_checkpointing():
        found: dict[str, Any] = dict(tally.state_dict())
        if states := {name: s.state_dict() for name, s in strategies_of(optimizer, settings)}:
            found[STRATEGIES] = states
        groups = [_of_numbers(group, {}) for group in state_dict["param_groups"]]
        return {**state_dict, "param_groups": groups, KEY: found}
    trained = {
        index: param
        for group, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True)
        for param, index in zip(group["params"], saved["params"], strict=True)
        if param.requires_grad
    }
    # An optimizer without any state needs an entry for each parameter, or those without would be missed.
    state = dict(state_dict["state"]) or {index: {} for index in trained}
    first = next((index for index in trained if index in state), None)
    # FullyShardedDataParallel takes a vector for a shard, and numbers only if all ranks have the same.
    if first is not None and not getattr(trained[first], "_fsdp_flattened", False):
        row = [tally.state_dict()[name] for name in _NAMES]
        for strategy, num_gradients in _strategies(optimizer, settings):
            if strategy.grows:
                warnings.warn(
                    f"{strategy!r}: torch.distributed.checkpoint cannot keep what grows, and a resumed run "
                    f"starts it anew; give it a window, or save the optimizer's own state_dict() beside.",
                    stacklevel=2,
                )
            row += packed(strategy, num_gradients)
        state[first] = {**state[first], KEY: _as_tensor(row, trained[first].device)}
    # Flattened, it wants a number for every key of a group.
    groups = [_of_numbers(group, {GROUP_KEY: math.inf}) for group in state_dict["param_groups"]]
    return {**state_dict, "param_groups": groups, "state": state}


def without_counters(state_dict: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return an optimizer's own `state_dict`, and the counters that were in it."""
    rest = {key: value for key, value in state_dict.items() if key != KEY}
    state = rest.get("state", {})
    carried = [entry[KEY] for entry in state.values() if isinstance(entry, dict) and KEY in entry]
    if not carried:
        return rest, state_dict.get(KEY)
    own = {key: _without_key(entry) for key, entry in state.items()}
    rest["state"] = {key: entry for key, entry in own.items() if entry != {}}
    found = next((entry for entry in carried if isinstance(entry, Tensor)), None)
    if found is None:
        return rest, None
    row = found.tolist()
    return rest, {**dict(zip(_NAMES, row, strict=False)), _ROW: row[len(_NAMES) :]}


def loading(
    optimizer: Optimizer, counters: dict[str, Any] | None, tally: Tally, settings: Settings
) -> Callable[[], None]:
    """Return what lets counters and strategies go on from a checkpoint, for when the optimizer has loaded.

    Nothing has changed before it is called. It gives groups back the strategies and tensors that are their
    max_norm, which no checkpoint has.

    Raises:
        ValueError: The checkpoint is of another strategy.
    """
    numbers = dict(counters or {})
    row, saved = numbers.pop(_ROW, []), numbers.pop(STRATEGIES, {})
    states = [(s, saved[name]) for name, s in strategies_of(optimizer, settings) if name in saved]
    if row:
        states += unpacked_all(row, _strategies(optimizer, settings))
    for strategy, state in states:
        copy.deepcopy(strategy).load_state_dict(state)  # objects to what it cannot load
    own = [group.get(GROUP_KEY) for group in optimizer.param_groups]

    def go_on() -> None:
        tally.load_state_dict(numbers or None)
        for strategy, state in states:
            strategy.load_state_dict(state)
        for group, limit in zip(optimizer.param_groups, own, strict=True):
            if isinstance(limit, Strategy | Tensor):
                group[GROUP_KEY] = limit

    return go_on


def _strategies(optimizer: Optimizer, settings: Settings) -> Iterator[tuple[Strategy, int]]:
    """Yield the strategies at work, and how many gradients each has at most."""
    for clipper in clippers("state_dict", optimizer, settings):
        if isinstance(clipper.max_norm, Strategy):
            yield clipper.max_norm, sum(param.requires_grad for param in clipper.params)


def _of_numbers(group: dict[str, Any], instead: dict[str, Any]) -> dict[str, Any]:
    """Return a group without a max_norm that plain torch could not load, and with something instead."""
    if isinstance(group.get(GROUP_KEY), Strategy | Tensor):
        return {**{key: value for key, value in group.items() if key != GROUP_KEY}, **instead}
    return group


def _as_tensor(row: list[float], device: torch.device) -> Tensor:
    """Return what torch.distributed.checkpoint takes for state: a tensor that is beside its parameter."""
    dtype = torch.float32 if device.type == "mps" else torch.float64
    return torch.tensor(row, dtype=dtype, device="cpu").to(device)


def _without_key(entry: Any) -> Any:
    if not isinstance(entry, dict):
        return entry
    return {name: value for name, value in entry.items() if name != KEY}


def make_state(optimizer: Optimizer) -> None:
    """Make the state that a first step makes, as if none had been taken.

    For torch.distributed.checkpoint, which has set gradients and learning rates to 0, and which saves and
    loads what state there is. Parameters keep their bits: nothing decays, and no step is counted.
    """
    decays = [group.get("weight_decay") for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        if "weight_decay" in group:
            group["weight_decay"] = 0.0
    try:
        optimizer.step()
    finally:
        for group, decay in zip(optimizer.param_groups, decays, strict=True):
            if "weight_decay" in group:
                group["weight_decay"] = decay
    for state in optimizer.state.values():
        step = state.get("step")
        if isinstance(step, Tensor):
            with torch.no_grad():
                step.zero_()
        elif step is not None:
            state["step"] = 0
