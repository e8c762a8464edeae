"""The GPU benchmark: what needs no GPU of it, on the CPU in its place."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from readme_tables import gpu_table

ROOT = Path(__file__).parents[1]


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    """Every mode of the dry workloads, timed as little as possible."""
    from gpu_suite.device import DryDevice
    from gpu_suite.timing import time_workload
    from gpu_suite.workloads import DRY_WORKLOADS

    device = DryDevice()
    return [
        row.as_json()
        for workload in DRY_WORKLOADS
        for row in time_workload(device, workload, ["cpu"], budget_s=0.0, with_compiled=False)
    ]


def test_rows_hold_every_peer_with_its_error(rows: list[dict[str, Any]]) -> None:
    assert [row["mode"] for row in rows] == ["norm", "inactive", "active"] * 2
    for row in rows:
        assert set(row["device_ms"]) == set(row["host_ms"]) == {"cpu", "torch_foreach", "torch_loop"}
        assert row["relative_errors"]["cpu"] < 2e-7
        assert row["necessary_nbytes"] == row["nbytes"] * (3 if row["mode"] == "active" else 1)
        assert row["left_out"] == {"torch_compile": "no time"}
    json.dumps(rows)


def test_active_calls_halve_the_gradients_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from gpu_suite import timing
    from gpu_suite.device import DryDevice
    from gpu_suite.subjects import fastclip_peer
    from gpu_suite.workloads import DRY_WORKLOADS

    from fastclip.bench.models import gradients

    monkeypatch.setattr(timing, "NUM_SETS", 2)
    device = DryDevice()
    sets = timing.Sets(DRY_WORKLOADS[0], device)
    calls, before = timing._calls(device, sets, [fastclip_peer("cpu")], "active")
    for _ in range(5):
        before()
        norm = calls["cpu"]()
        assert isinstance(norm, torch.Tensor)
        assert norm.item() == pytest.approx(sets.total_norm, rel=0.25)
        left = timing._float64_norm(sets.lists[sets.current])
        assert left == pytest.approx(sets.total_norm / 2, rel=1e-5)
        assert all(g.isfinite().all() for g in gradients(sets.lists[sets.current]))


def test_workloads_are_those_that_others_publish() -> None:
    from gpu_suite.workloads import WORKLOADS

    by_name = {w.workload.name: w for w in WORKLOADS}
    assert (by_name["llama3-8b"].workload.num_tensors, by_name["llama3-8b"].workload.numel) == (
        291,
        8_030_261_248,
    )
    assert by_name["bf16-6000261x256"].nbytes == 6_000_261 * 256 * 2
    mixed = by_name["mixed-225m"]
    assert mixed.workload.num_tensors == 500
    assert mixed.workload.numel == pytest.approx(225e6, rel=2e-3)
    assert mixed.nbytes == pytest.approx(3 * mixed.workload.numel, rel=1e-2)


def test_the_large_check_runs_small() -> None:
    from gpu_suite.device import DryDevice
    from gpu_suite.large import DRY_NUMEL, check_large
    from gpu_suite.subjects import fastclip_peer

    assert check_large(DryDevice(), fastclip_peer("cpu")) == {"numel": DRY_NUMEL}


def row(workload: str, mode: str, nbytes: float, **device_ms: float) -> dict[str, Any]:
    return {
        "workload": workload,
        "title": workload,
        "mode": mode,
        "nbytes": nbytes,
        "device_ms": {name: {50: ms} for name, ms in device_ms.items()},
        "host_ms": {name: {50: ms} for name, ms in device_ms.items()},
        "gbps": {name: nbytes / ms / 1e6 for name, ms in device_ms.items()},
        "relative_errors": dict.fromkeys(device_ms, 1e-8),
    }


def test_targets() -> None:
    from gpu_suite.targets import evaluate

    rows = [
        row("llama3-8b", "norm", 16e9, cuda=6.0, triton=6.0, torch_foreach=9.0),
        row("llama3-8b", "inactive", 16e9, cuda=6.0, triton=9.0, torch_foreach=18.0),
        row("2000-tiny", "active", 1e5, cuda=0.6, triton=0.3, torch_foreach=9.0),
    ]
    launches = {
        "active of 1": {"kernels": 2, "copies": 0, "waits": 0},
        "norm of 1": {"kernels": 1, "copies": 0, "waits": 1},
    }
    targets = {t.name: (t.reached, t.met) for t in evaluate("cuda", rows, launches, 3000.0)}
    assert targets == {
        "kernels per call": (2, True),
        "synchronizing calls": (1, False),
        "norm of 1 GB or more, of the copy bandwidth": (pytest.approx(16e9 / 6e6 / 3000), False),
        "torch foreach over fastclip, Llama-3-8B inactive": (3.0, True),
        "torch foreach over fastclip, Llama-3-8B active": (None, None),
        "host time, 2000 tiny tensors": (0.6, False),
        "torch foreach over fastclip, same": (pytest.approx(15.0), True),
        "bfloat16 tensor of 6,000,261 x 256, active": (None, None),
        "error of the norm": (1e-8, True),
        "Triton over CUDA, 100 MB or more": (1.5, False),
    }
    assert all(t.met is None for t in evaluate("cuda", [], {}, 3000.0))


def test_the_readme_says_that_no_gpu_was_measured_until_one_was(tmp_path: Path) -> None:
    run = {
        "dry_run": True,
        "quick": False,
        "environment": {
            "gpu": "NVIDIA X",
            "driver": "1.2",
            "torch": "2.13",
            "commit": "abc",
            "date": "2030-01-02T",
        },
        "checks": {"cuda": {}},
        "copy_gbps": 3000.0,
        "rows": [row("llama3-8b", "inactive", 16e9, cuda=6.0, torch_foreach=18.0)],
    }
    path = tmp_path / "gpu-x.json"
    assert gpu_table(tmp_path).startswith("No GPU has been measured")
    path.write_text(json.dumps(run), encoding="utf-8")
    assert gpu_table(tmp_path).startswith("No GPU has been measured")
    path.write_text(json.dumps({**run, "dry_run": False}), encoding="utf-8")
    table = gpu_table(tmp_path)
    assert "on an NVIDIA X, driver 1.2" in table
    assert "| llama3-8b | inactive | 18.0 | 6.00 | **3.0x** | 2667 | 89% |" in table


def test_a_deadline_counts_down() -> None:
    from gpu_suite.timing import Deadline

    clock = iter((10.0, 12.5, 400.0))
    deadline = Deadline(60.0, lambda: next(clock))
    assert deadline.left_s() == 57.5
    assert deadline.left_s() < 0
    assert math.isfinite(Deadline(1.0).left_s())
