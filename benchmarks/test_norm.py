"""The norm alone: one read of the gradients."""

from __future__ import annotations

from pytest_benchmark.fixture import BenchmarkFixture

from fastclip.bench.cases import DTYPES, Case, Clipping
from fastclip.bench.check import Check
from fastclip.bench.peers import Peer


def test_norm(benchmark: BenchmarkFixture, checked: Check, peer: Peer) -> None:
    case = Case(checked.workload, checked.dtype, "norm")
    benchmark.group = str(case)
    benchmark.extra_info["nbytes"] = case.traffic.nbytes
    benchmark.extra_info["relative_error"] = checked.relative_errors[peer.name]
    parameters = case.workload.parameters(DTYPES[case.dtype])
    benchmark(Clipping([parameters], case.mode, checked.total_norm).call(peer))
