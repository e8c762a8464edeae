"""Workloads for the suites, each checked against float64 before anything is timed on it."""

from __future__ import annotations

import pytest

from fastclip.bench.check import Check, check
from fastclip.bench.models import WORKLOADS
from fastclip.bench.peers import PEERS, Peer


@pytest.fixture(scope="session", params=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> str:
    """Type of the gradients."""
    return request.param


@pytest.fixture(scope="session", params=WORKLOADS.values(), ids=lambda workload: workload.name)
def checked(request: pytest.FixtureRequest, dtype: str) -> Check:
    """One workload in one dtype; an implementation that is wrong on it fails here, untimed."""
    return check(request.param, dtype, PEERS)


@pytest.fixture(params=PEERS, ids=lambda peer: peer.name)
def peer(request: pytest.FixtureRequest) -> Peer:
    """One implementation."""
    return request.param
