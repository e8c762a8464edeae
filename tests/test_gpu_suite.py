"""The GPU benchmark: what needs no GPU of it, on the CPU in its place."""

from __future__ import annotations

import gc
import json
import math
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu
import pytest
import torch
from gpu_suite.device import DryDevice
from gpu_suite.waiting import forbidden_waits
from readme_tables import gpu_all_table, gpu_steps_table, gpu_table

import fastclip

ROOT = Path(__file__).parents[1]


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    """Every mode of the dry workloads, timed as little as possible."""
    from gpu_suite.timing import time_workload
    from gpu_suite.workloads import DRY_WORKLOADS

    device = DryDevice()
    return [
        row.as_json()
        for workload in DRY_WORKLOADS
        for row in time_workload(device, workload, ["cpu"], budget_s=0.0)
    ]


def test_rows_hold_every_peer_with_its_error(rows: list[dict[str, Any]]) -> None:
    assert [row["mode"] for row in rows] == ["norm", "inactive", "active"] * 2
    for row in rows:
        assert set(row["device_ms"]) == set(row["host_ms"]) == {"cpu", "torch_foreach", "torch_loop"}
        assert row["relative_errors"]["cpu"] < 2e-7
        assert row["necessary_nbytes"] == row["nbytes"] * (3 if row["mode"] == "active" else 1)
        assert row["left_out"]["apex"] == "amp_C is not installed"
    json.dumps(rows)


def test_active_calls_halve_the_gradients_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from gpu_suite import timing
    from gpu_suite.subjects import fastclip_peer
    from gpu_suite.workloads import DRY_WORKLOADS

    from fastclip.bench.models import gradients

    monkeypatch.setattr(timing, "NUM_SETS", 2)
    device = DryDevice()
    sets = timing.Sets(DRY_WORKLOADS[0], device)
    calls, before = timing._calls(device, sets, [fastclip_peer("cpu")], "active", {})
    for _ in range(5):
        before()
        norm = calls["cpu"]()
        assert isinstance(norm, torch.Tensor)
        assert norm.item() == pytest.approx(sets.total_norm, rel=0.25)
        left = timing.float64_norm(sets.lists[sets.current])
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
    from gpu_suite.large import DRY_NUMEL, check_large
    from gpu_suite.subjects import fastclip_peer

    assert check_large(DryDevice(), fastclip_peer("cpu")) == {"numel": DRY_NUMEL}


@pytest.fixture
def step_rows() -> list[dict[str, Any]]:
    """Every optimizer and mode of the dry workloads, timed as little as possible."""
    from gpu_suite.steps import step_workloads, time_steps

    device = DryDevice()
    return [
        row.as_json()
        for workload in step_workloads(device)
        for row in time_steps(device, workload, ["cpu"], budget_s=0.0)
    ]


def test_step_rows_hold_every_peer(step_rows: list[dict[str, Any]]) -> None:
    modes = [f"{kind} {mode}" for kind in ("adamw", "sgd-momentum") for mode in ("inactive", "active")]
    assert [row["mode"] for row in step_rows] == modes * 2
    for row in step_rows:
        assert set(row["device_ms"]) == set(row["host_ms"]) == {"cpu", "torch_fused", "torch_default"}
        assert row["relative_errors"]["cpu"] < 2e-7
        # The gradients once more than the update reads and writes parameter, gradient and state.
        assert row["necessary_nbytes"] == row["nbytes"] * (8 if row["mode"].startswith("adamw") else 6)
    json.dumps(step_rows)


def test_peers_share_moments_and_have_counters_of_their_own() -> None:
    from gpu_suite.steps import Stepped, peers_of, real_parameters, step_workloads
    from gpu_suite.timing import float64_norm

    from fastclip.bench.models import gradients
    from fastclip.bench.steps import STEP_KINDS

    device = DryDevice()
    parameters = real_parameters(next(step_workloads(device)), device)
    stepped = Stepped(parameters, float64_norm(parameters))
    peers = peers_of(stepped, STEP_KINDS["adamw"], ["cpu"], device)
    stepped.set_mode("active")
    for name in ("cpu", "torch_fused", "torch_default", "torch_default"):
        stepped.restore()
        assert float64_norm(parameters) == pytest.approx(stepped.total_norm, rel=1e-5)
        peers[name]()
        halved = name != "cpu"
        assert stepped.written is halved
        assert float64_norm(parameters) == pytest.approx(stepped.total_norm / (1 + halved), rel=1e-5)
    assert stepped.norm_error("cpu") < 2e-7
    # The step that made the state was one more.
    assert stepped.clipped["cpu"].state[parameters[0]]["step"] == 2
    assert all(g.isfinite().all() for g in gradients(parameters))


def test_as_many_layers_as_fit() -> None:
    from gpu_suite.steps import LLAMA_DEPTH, fitting_depth

    gib = 2**30
    depths = [fitting_depth(n * gib) for n in (1, 16, 40, 78, 140)]
    assert depths == sorted(depths)
    assert depths[0] == 0
    assert 20 <= depths[3] < LLAMA_DEPTH
    assert depths[4] == LLAMA_DEPTH


def test_what_needs_a_graph_or_a_profiler_runs_with_both_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    from gpu_suite import step_checks, steps

    class Accelerator(DryDevice):
        is_accelerator = True

    device = Accelerator()
    monkeypatch.setattr(step_checks, "captured", lambda call, warm_up: (call, None))
    assert step_checks.check_step_capture(device, "cpu") == {"replays": 32}
    monkeypatch.setattr(step_checks, "captured", lambda call, warm_up: (lambda: None, None))
    with pytest.raises(AssertionError, match="differ from a step's"):
        step_checks.check_step_capture(device, "cpu")
    counts = {"kernels": 3, "copies": 0, "waits": 0}
    monkeypatch.setattr(step_checks, "counts_of", lambda call: call() or counts)
    assert step_checks.check_step_launches(device, "cpu")["SGD of 2000"] == counts
    counts["kernels"] = 4
    with pytest.raises(AssertionError, match="AdamW of 1 tensors: 4 kernels"):
        step_checks.check_step_launches(device, "cpu")
    monkeypatch.setattr(steps, "captured", lambda call: (call, None))
    workload = next(steps.step_workloads(DryDevice()))
    rows = [row.as_json() for row in steps.time_steps(device, workload, ["cpu"], budget_s=0.0)]
    assert all("cpu_graph" in row["device_ms"] for row in rows)


def test_a_wrong_step_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    import optim_cases
    from gpu_suite.step_checks import step_failures

    monkeypatch.setattr(optim_cases, "OPTIONS", {"adamw": optim_cases.OPTIONS["adamw"]})
    assert [complaint for _, complaint in step_failures(DryDevice(), "cpu")] == [None] * 4
    wrong = (torch.optim.AdamW, {"lr": 1.001e-2})
    make = optim_cases.make
    calls = iter(range(100))

    def make_every_other_wrong(option: str, params: Any) -> torch.optim.Optimizer:
        monkeypatch.setitem(optim_cases.OPTIONS, "wrong", wrong)
        return make("wrong" if next(calls) % 2 else option, params)

    monkeypatch.setattr(optim_cases, "make", make_every_other_wrong)
    name, complaint = next(step_failures(DryDevice(), "cpu"))
    assert name == "step adamw float32"
    assert complaint is not None
    assert "beyond a bound" in complaint


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


def test_targets_of_steps() -> None:
    from gpu_suite.targets import evaluate_steps

    rows = [
        row("llama3-8b", "adamw inactive", 16e9, triton=20.0, torch_fused=30.0),
        row("llama3-8b", "adamw active", 16e9, triton=20.0, torch_fused=22.0),
    ]
    launches = {"AdamW of 1": {"kernels": 3, "copies": 0, "waits": 0}}
    targets = {t.name: (t.reached, t.met) for t in evaluate_steps("triton", rows, launches, 3000.0)}
    assert targets == {
        "kernels per step": (3, True),
        "synchronizing calls per step": (0, True),
        "torch clip + fused AdamW over fastclip, Llama-3-8B inactive": (1.5, True),
        "torch clip + fused AdamW over fastclip, Llama-3-8B active": (1.1, False),
        "error of the norm of a step": (1e-8, True),
    }
    assert all(t.met is None for t in evaluate_steps("triton", [], {}, 3000.0))


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
    from gpu_suite.plot import draw

    inactive, active, *_ = draw(run_of()).axes
    assert [label.get_text() for label in inactive.get_yticklabels()] == ["llama3-8b", "mixed-225m"]
    assert inactive.texts[0].get_text() == f"{6.0 / (16e9 / 3e9):.2f}"
    drawn = [tuple(points.get_offsets()[0]) for points in active.collections]
    wanted = [(ms / (16e9 / 3e9), 0) for ms in (12.0, 18.0, 6.0)] + [
        (ms / (1e9 / 3e9), 1) for ms in (1.0, 2.0)
    ]
    assert drawn == [pytest.approx(point) for point in wanted]


def test_a_deadline_counts_down() -> None:
    from gpu_suite.timing import Deadline

    clock = iter((10.0, 12.5, 400.0))
    deadline = Deadline(60.0, lambda: next(clock))
    assert deadline.left_s() == 57.5
    assert deadline.left_s() < 0
    assert math.isfinite(Deadline(1.0).left_s())


def test_a_test_that_fails_leaves_no_mode_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[int | str] = [0]

    def set_mode(mode: int | str) -> None:
        modes.append(mode)
        warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=2)

    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    with pytest.raises(ZeroDivisionError), forbidden_waits():
        1 / 0  # noqa: B018
    assert modes == [0, "error", 0]


def test_other_warnings_of_the_mode_are_errors_and_leave_none_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[int | str] = [0]

    def set_mode(mode: int | str) -> None:
        modes.append(mode)
        if mode == "error":
            warnings.warn("something else", stacklevel=2)

    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    with pytest.raises(UserWarning, match="something else"), forbidden_waits():
        pass
    assert modes == [0, "error", 0]


def test_that_benchmarks_are_off_in_several_processes_is_no_error() -> None:
    warnings.warn("Benchmarks are automatically disabled because xdist plugin is active.", stacklevel=1)


def test_a_row_runs_the_backend_whose_name_it_carries() -> None:
    from gpu_suite.subjects import fastclip_peer, within

    from fastclip import backends

    assert within("eager", backends.chosen)() == "eager"
    inside = within("cpu", backends.chosen)
    gc.collect()  # what holds the choice must not be collected
    with fastclip.use_backend("eager"):
        assert inside() == "cpu"
        assert backends.chosen() == "eager"
    unusable = next(name for name, info in fastclip.backend_info().items() if not info.available)
    with pytest.raises(fastclip.BackendUnavailableError, match=unusable):
        fastclip_peer(unusable)


def test_an_annotation_is_no_kernel() -> None:
    from gpu_suite.launches import count_events

    def event(name: str, start: int, *, on_device: bool, annotation: bool = False) -> SimpleNamespace:
        kind = torch.autograd.DeviceType.CUDA if on_device else torch.autograd.DeviceType.CPU
        time_range = SimpleNamespace(start=start)
        return SimpleNamespace(
            name=name, time_range=time_range, device_type=kind, is_user_annotation=annotation
        )

    step = "Optimizer.step#ClippedOptimizer.step"
    events = [
        event("cudaDeviceSynchronize", 9, on_device=False),  # the profiler's own, behind the last launch
        event(step, 0, on_device=False, annotation=True),
        event("cudaLaunchKernel", 1, on_device=False),
        event("accumulate", 2, on_device=True),
        event(step, 2, on_device=True, annotation=True),
    ]
    assert count_events(events) == {"kernels": 1, "copies": 0, "waits": 0}
    more = [event("cudaMemcpyAsync", 0, on_device=False), event("Memcpy HtoD", 1, on_device=True)]
    assert count_events([*events, *more]) == {"kernels": 1, "copies": 1, "waits": 1}


def test_the_profiler_says_what_is_an_annotation() -> None:
    with torch.profiler.profile() as profiler, torch.profiler.record_function("a region"):
        torch.ones(3).sum()
    kinds = {event.name: event.is_user_annotation for event in profiler.events()}
    assert kinds["a region"]
    assert not kinds["aten::sum"]


def test_what_failed_its_checks_is_not_timed() -> None:
    from gpu_suite.sections import unproven_peers
    from gpu_suite.steps import step_workloads, time_steps
    from gpu_suite.timing import time_workload
    from gpu_suite.workloads import DRY_WORKLOADS

    device = DryDevice()
    failed = {
        "cuda": {"capture": "x", "step_launches": "4 kernels"},
        "triton": {"step adamw float32": "x"},
        "cpu": {"process": "exit code -11"},
    }
    checks = {name: {"failed": parts} for name, parts in failed.items()}
    of_clips, of_steps = (unproven_peers(checks, of_steps=of_steps) for of_steps in (False, True))
    assert set(of_clips) == {"cuda_graph", "cpu", "cpu_graph"}
    assert set(of_steps) == {"triton", "triton_graph", "cpu", "cpu_graph"}
    rows = [
        *time_workload(device, DRY_WORKLOADS[0], ["cpu"], budget_s=0.0, unproven=of_clips),
        *time_steps(device, next(step_workloads(device)), ["cpu"], budget_s=0.0, unproven=of_steps),
    ]
    for row in rows:
        assert "cpu" not in row.device
        assert row.left_out["cpu"] == "process failed: exit code -11"
        assert len(row.device) == 2  # torch's are there


def test_a_section_that_dies_is_named_and_the_rest_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of a run that describes the device, times DTensors, and dies."""
    path = tmp_path / "run.json"
    arguments = ["gpu.py", "--cpu-dry-run", "--no-build", "--section", "distributed", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", arguments)
    assert gpu.main() == 0
    result = json.loads(path.read_text(encoding="utf-8"))
    assert list(result["failed_sections"]) == ["fail"]
    assert "this section fails on purpose" in result["failed_sections"]["fail"]
    assert result["on_purpose"] == [{"title": "a row before the failure"}]
    (dtensors,) = result["distributed"]
    assert {"torch", "fastclip", "ClippedOptimizer"} <= set(dtensors["host_ms"]) | set(dtensors["failed"])
    assert "FAILED fail" in capfd.readouterr().out


def test_a_process_that_hangs_is_ended() -> None:
    program = "import time; print('begun', flush=True); time.sleep(60)"
    complaint = gpu.watch([sys.executable, "-c", program], 2.0)
    assert complaint is not None
    assert complaint.startswith("took more than 2 s: begun")


def test_iterations_train_and_clip() -> None:
    from gpu_suite.training import DRY, GPT2, Gpt, iterations

    torch.manual_seed(0)
    model = Gpt(DRY)
    indices = torch.randint(DRY.vocabulary, (DRY.batch, DRY.length + 1))
    before = model(indices).item()
    calls, clipped = iterations(model, indices, DryDevice())
    assert list(calls) == ["none", "torch", "fastclip", "clipped", "clipped_fused"]
    for call in calls.values():
        call()
    assert model(indices).item() < before
    for optimizer in clipped.values():
        assert optimizer.route == "native"
        assert optimizer.stats().steps == 4
    with torch.device("meta"):
        assert sum(p.numel() for p in Gpt(GPT2).parameters()) == 124_439_808
