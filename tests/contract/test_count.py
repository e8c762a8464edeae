"""Counting: every target finds each nan and inf, and names the gradient."""

from __future__ import annotations

import itertools
import math

import torch
from cases import DTYPES, Case, parameters_of
from targets import Target, dtypes, on

import fastclip
from fastclip import Nonfinite


def sizes(target: Target) -> list[tuple[Case, torch.dtype]]:
    few = ("inf_then_nan", "minus_inf", "offset", "some_empty", "nan_in_many_chunks")
    return list(itertools.product((c for c in target.some(*few) if c.dense), DTYPES))


@on("case dtype", sizes)
def test_counts_are_those_of_torch(target: Target, case: Case, dtype: torch.dtype) -> None:
    named = [(str(i), p) for i, p in enumerate(case.parameters(target.device, dtype))]
    counts = {
        name: (int(p.grad.isnan().sum()), int(p.grad.isinf().sum()))
        for name, p in named
        if p.grad is not None
    }
    assert fastclip.find_nonfinite(named) == {name: found for name, found in counts.items() if any(found)}


@on("dtype", dtypes)
def test_nonfinite_elements_are_counted_and_named(target: Target, dtype: torch.dtype) -> None:
    many = torch.ones(100_003 if target.is_quick else 2_003, dtype=dtype)
    many[::1000] = math.nan
    many[7::5000] = -math.inf
    few = torch.tensor([[1.0, math.inf], [-math.inf, math.inf]], dtype=dtype)
    grads = [
        *(None, torch.full((40,), torch.finfo(dtype).max, dtype=dtype), many, few),
        *(torch.empty(0, dtype=dtype), torch.tensor(math.nan, dtype=dtype)),
    ]
    on_device = [None if grad is None else grad.to(target.device) for grad in grads]
    found = fastclip.find_nonfinite((f"layer.{i}", p) for i, p in enumerate(parameters_of(on_device)))
    assert list(found.items()) == [
        ("layer.2", Nonfinite(nan=101, inf=20)) if target.is_quick else ("layer.2", Nonfinite(nan=3, inf=1)),
        ("layer.3", Nonfinite(nan=0, inf=3)),
        ("layer.5", Nonfinite(nan=1, inf=0)),
    ]


@on()
def test_a_chunk_of_them(target: Target) -> None:
    grads = [
        torch.full((n,), value, device=target.device) for n, value in ((700, math.nan), (900, -math.inf))
    ]
    assert fastclip.find_nonfinite(zip("ab", parameters_of(grads), strict=True)) == {
        "a": (700, 0),
        "b": (0, 900),
    }


@on("dtype", lambda _: ((torch.bfloat16,), (torch.float16,)))
def test_of_every_16_bit_pattern(target: Target, dtype: torch.dtype) -> None:
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    if not target.is_quick:
        patterns = torch.cat([patterns[~patterns.isfinite()], patterns[patterns.isfinite()][::17]])
    (parameter,) = parameters_of([patterns.to(target.device)])
    assert fastclip.find_nonfinite([("all", parameter)]) == {"all": (int(patterns.isnan().sum()), 2)}
