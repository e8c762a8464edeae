"""What is made of a run on a device: targets, the tables of the README, the picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from readme_tables import gpu_all_table, gpu_steps_table, gpu_table

from fastclip.bench.device_plot import draw
from fastclip.bench.targets import evaluate


def row(workload: str, mode: str, nbytes: float, **device_ms: float) -> dict[str, Any]:
    return {
        "workload": workload,
        "title": workload,
        "mode": mode,
        "nbytes": nbytes,
        "necessary_nbytes": nbytes,
        "device_ms": {name: {50: ms} for name, ms in device_ms.items()},
        "host_ms": {name: {50: ms} for name, ms in device_ms.items()},
        "gbps": {name: nbytes / ms / 1e6 for name, ms in device_ms.items()},
        "relative_errors": dict.fromkeys(device_ms, 1e-8),
    }


def test_targets() -> None:
    clips = [
        row("llama3-8b", "norm", 16e9, cuda=6.0, triton=6.0, torch_foreach=9.0),
        row("llama3-8b", "inactive", 16e9, cuda=6.0, triton=9.0, torch_foreach=18.0),
        row("2000-tiny", "active", 1e5, cuda=0.6, triton=0.3, torch_foreach=9.0),
    ]
    steps = [
        row("llama3-8b", "adamw inactive", 16e9, cuda=20.0, torch_fused=30.0),
        row("llama3-8b", "adamw active", 16e9, cuda=20.0, torch_fused=22.0),
    ]
    counted = {
        "launches": {
            "active of 1": {"kernels": 2, "copies": 0, "waits": 0},
            "norm of 1": {"kernels": 1, "copies": 0, "waits": 1},
        },
        "step_launches": {"AdamW of 1": {"kernels": 3, "copies": 0, "waits": 0}},
    }
    run = run_of(clips=clips, steps=steps, checks={"cuda": counted})
    assert {t.name: (t.reached, t.met) for t in evaluate("cuda", run)} == {
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
        "kernels per step": (3, True),
        "synchronizing calls per step": (0, True),
        "torch clip + fused AdamW over fastclip, Llama-3-8B inactive": (1.5, True),
        "torch clip + fused AdamW over fastclip, Llama-3-8B active": (1.1, False),
        "error of the norm of a step": (1e-8, True),
    }
    assert all(t.met is None for t in evaluate("cuda", run_of(clips=[], steps=[])))


def run_of(**more: Any) -> dict[str, Any]:
    """A run of benchmarks/gpu.py, as it is read from its file."""
    ms = {"none": 100.0, "torch": 101.0, "fastclip": 100.5, "clipped": 100.1}
    iteration = {peer: {50: value} for peer, value in ms.items()}
    run = {
        "dry_run": False,
        "quick": False,
        "measured_with": "abc and a change.",
        "environment": {"gpu": "NVIDIA X", "driver": "1.2", "torch": "2.13", "commit": "abc", "date": "2030"},
        "checks": {"cuda": {}, "triton": {}},
        "copy_gbps": 3000.0,
        "clips": [
            row("llama3-8b", "norm", 16e9, cuda=5.0, torch_foreach=9.0),
            row("llama3-8b", "inactive", 16e9, cuda=6.0, torch_foreach=18.0, apex=12.0),
            row("llama3-8b", "active", 16e9, cuda=12.0, torch_foreach=18.0, apex=6.0),
            row("2000-tiny", "active", 1e5, cuda=0.02, torch_foreach=0.2),
            row("mixed-225m", "active", 1e9, cuda=1.0, torch_foreach=2.0),
        ],
        "steps": [row("gpt2", "adamw active", 4e9, cuda=1.6, torch_fused=3.2, torch_default=8.0)],
        "training": [{"workload": "gpt2-124m", "title": "GPT", "compiled": False, "ms": iteration}],
        "distributed": [
            {"title": "D", "host_ms": {"torch": {50: 3.5}}, "failed": {"clipped": "RuntimeError"}},
        ],
        **more,
    }
    read: dict[str, Any] = json.loads(json.dumps(run))
    return read


def test_the_readme_says_that_no_gpu_was_measured_until_one_was(tmp_path: Path) -> None:
    path = tmp_path / "gpu-x.json"
    assert gpu_table(tmp_path).startswith("No GPU has been measured")
    for run in (run_of(dry_run=True), run_of(quick=True)):
        path.write_text(json.dumps(run), encoding="utf-8")
        assert gpu_table(tmp_path).startswith("No GPU has been measured")
    path.write_text(json.dumps(run_of()), encoding="utf-8")
    table = gpu_table(tmp_path)
    assert table.startswith("**NVIDIA X.** Clipping llama3-8b: 6.00 ms")
    assert "costs **0.10%** with `ClippedOptimizer`, 0.50% with" in table
    assert "Driver 1.2" in table
    assert "(abc and a change)" in table
    # A row that is lost is shown like any other; what moves next to nothing has no share.
    assert "| llama3-8b | active | 18.0 | 6.00 | 12.0 | **1.5x** | 44% | 18.0 | 6.00 | 12.0 |" in table
    assert "| 2000-tiny | active | 0.200 |  | 0.020 | **10.0x** |  | 0.200 |  | 0.020 |" in table
    assert "mixed-225m" not in table
    assert "| llama3-8b | norm |" not in table


def test_every_row_of_a_gpu_stands_beside_the_benchmarks(tmp_path: Path) -> None:
    (tmp_path / "gpu-x.json").write_text(json.dumps(run_of()), encoding="utf-8")
    steps = gpu_steps_table(tmp_path)
    assert "| gpt2 | adamw active | 3.20 | 8.00 | 1.60 | **2.0x** | **5.0x** | 83% | 3.20 | 1.60 |" in steps
    everything = gpu_all_table(tmp_path)
    assert "| mixed-225m | active |" in everything
    assert "| llama3-8b | norm |" in everything
    assert "| clipped | failed: RuntimeError |" in everything


def test_the_picture_shows_each_peer_over_the_floor() -> None:
    inactive, active, *_ = draw(run_of()).axes
    assert [label.get_text() for label in inactive.get_yticklabels()] == ["llama3-8b", "mixed-225m"]
    assert inactive.texts[0].get_text() == f"{6.0 / (16e9 / 3e9):.2f}"
    drawn = [tuple(points.get_offsets()[0]) for points in active.collections]
    wanted = [(ms / (16e9 / 3e9), 0) for ms in (12.0, 18.0, 6.0)] + [
        (ms / (1e9 / 3e9), 1) for ms in (1.0, 2.0)
    ]
    assert drawn == [pytest.approx(point) for point in wanted]
