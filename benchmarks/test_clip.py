"""Norm, and norm and clip: a second pass over the gradients only where there is something to clip."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from fastclip.bench.cases import DTYPES, MODES, Case, Clipping
from fastclip.bench.check import Check, check
from fastclip.bench.models import WORKLOADS
from fastclip.bench.peers import PEERS, Peer

NUM_ROUNDS = 15


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> str:
    """Type of the gradients."""
    return request.param


@pytest.fixture(scope="module", params=WORKLOADS.values(), ids=lambda workload: workload.name)
def checked(request: pytest.FixtureRequest, dtype: str) -> Check:
    """One workload in one dtype; an implementation that is wrong on it fails here, untimed."""
    return check(request.param, dtype, PEERS)


@pytest.fixture(params=PEERS, ids=lambda peer: peer.name)
def peer(request: pytest.FixtureRequest) -> Peer:
    """One implementation."""
    return request.param


@pytest.mark.parametrize("mode", MODES)
def test_clip(benchmark: BenchmarkFixture, checked: Check, peer: Peer, mode: str) -> None:
    case = Case(checked.workload, checked.dtype, mode)
    benchmark.group = str(case)
    benchmark.extra_info["nbytes"] = case.traffic.nbytes
    benchmark.extra_info["relative_error"] = checked.relative_errors[peer.name]
    clipping = Clipping([case.workload.parameters(DTYPES[case.dtype])], mode, checked.total_norm)
    # A setup before each round makes it one call long.
    benchmark.pedantic(clipping.call(peer), setup=clipping.prepare, rounds=NUM_ROUNDS, warmup_rounds=1)
