"""The benchmark on a device: what needs no GPU of it, on the CPU in its place."""

from __future__ import annotations

import gc
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu
import pytest
import torch
from click.testing import CliRunner

import fastclip
from fastclip import backends, cli
from fastclip.bench import launches, models, sections, suite
from fastclip.bench.cases import Clipping, dtypes_of
from fastclip.bench.check import CheckError, captured, check, float64_norm
from fastclip.bench.devices import Dry
from fastclip.bench.models import DEVICE_WORKLOADS, DRY_WORKLOADS, gradients
from fastclip.bench.peers import FASTCLIP, fastclip_peer, within
from fastclip.bench.sections import Section, unproven_peers
from fastclip.bench.steps import DEFAULT, FUSED, STEP_KINDS, Steps, check_captured_step, check_first_step
from fastclip.bench.training import DRY, GPT2, Gpt, iterations


class WithGraphs(Dry):
    """A device whose graphs are played by calls."""

    captures = True

    def capture(self, call: Callable[[], Any], *, warm_up: bool = True) -> tuple[Callable[[], None], Any]:
        if warm_up:
            call()
        result = torch.zeros(())

        def replay() -> None:
            got = call()
            if got is not None:
                result.copy_(got)

        return replay, result


class WithoutReplay(WithGraphs):
    """The same, whose replays do nothing."""

    def capture(self, call: Callable[[], Any], *, warm_up: bool = True) -> tuple[Callable[[], None], Any]:
        return lambda: None, torch.ones(())


def section(tmp_path: Path, device: Dry | None = None, unproven: dict[str, str] | None = None) -> Section:
    return Section(device or Dry(), tmp_path / "found.json", 60.0, False, ["cpu"], unproven or {})


@pytest.fixture(scope="module", params=[Dry, WithGraphs])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Clips and steps of the dry workloads, timed as little as possible, as their file has them."""
    running = section(tmp_path_factory.mktemp("run"), request.param())
    sections.time_clips(running)
    sections.time_all_steps(running)
    read: dict[str, Any] = json.loads(running.path.read_text(encoding="utf-8"))
    return {**read, "graphs": {"cpu_graph"} if request.param is WithGraphs else set()}


def test_rows_hold_every_peer_with_its_error(found: dict[str, Any]) -> None:
    assert [row["mode"] for row in found["clips"]] == ["norm", "inactive", "active"] * 2
    for row in found["clips"]:
        graphs = {*found["graphs"], "torch_foreach_graph"} if found["graphs"] else set()
        peers = {"cpu", "torch_foreach", "torch_loop"} | (graphs if row["mode"] != "norm" else set())
        assert set(row["device_ms"]) == set(row["host_ms"]) == peers
        assert row["relative_errors"]["cpu"] < 2e-7
        assert row["necessary_nbytes"] == row["nbytes"] * (3 if row["mode"] == "active" else 1)
        assert row["left_out"]["apex"] == "amp_C is not installed"


def test_step_rows_hold_every_peer(found: dict[str, Any]) -> None:
    modes = [f"{kind} {mode}" for kind in ("adamw", "sgd-momentum") for mode in ("inactive", "active")]
    assert [row["mode"] for row in found["steps"]] == modes * 2
    for row in found["steps"]:
        assert set(row["device_ms"]) == set(row["host_ms"]) == {"cpu", FUSED, DEFAULT} | found["graphs"]
        assert row["relative_errors"]["cpu"] < 2e-7
        # The gradients once more than the update reads and writes parameter, gradient and state.
        assert row["necessary_nbytes"] == row["nbytes"] * (8 if row["mode"].startswith("adamw") else 6)


@pytest.mark.parametrize("how", ["called", "captured"])
def test_active_calls_halve_the_gradients_every_time(how: str) -> None:
    device, many = WithGraphs(), DRY_WORKLOADS[0]
    lists = [many.parameters(*dtypes_of(many.dtype)) for _ in range(2)]
    total_norm = float64_norm(gradients(lists[0]))
    clipping = Clipping(lists, "active", total_norm, fixed=True)
    peer = fastclip_peer("cpu")
    call = clipping.call(peer) if how == "called" else clipping.captured(peer, device)
    seen = set()
    for _ in range(5):
        clipping.prepare()
        seen.add(id(clipping.gradients[0]))
        assert float64_norm(clipping.gradients) == pytest.approx(total_norm, rel=1e-5)
        call()
        assert float64_norm(clipping.gradients) == pytest.approx(total_norm / 2, rel=1e-5)
        assert all(g.isfinite().all() for g in clipping.gradients)
    assert len(seen) == 2


def test_workloads_are_those_that_others_publish() -> None:
    by_name = {workload.name: workload for workload in DEVICE_WORKLOADS}
    llama, mixed = by_name["llama3-8b"], by_name["mixed-225m"]
    assert (llama.num_tensors, llama.numel) == (291, 8_030_261_248)
    assert by_name["bf16-6000261x256"].nbytes(torch.bfloat16) == 6_000_261 * 256 * 2
    assert mixed.num_tensors == 500
    assert mixed.numel == pytest.approx(225e6, rel=2e-3)
    assert mixed.nbytes(*dtypes_of(mixed.dtype)) == pytest.approx(3 * mixed.numel, rel=1e-2)
    assert models.LARGE.numel > 2**31


def test_peers_share_moments_and_have_counters_of_their_own() -> None:
    parameters = DRY_WORKLOADS[0].parameters(torch.float32, with_values=True)
    steps = Steps(parameters, STEP_KINDS["adamw"], {"cpu": "cpu"}, Dry())
    calls = steps.calls("active")
    for name in ("cpu", FUSED, DEFAULT, DEFAULT):
        steps.prepare()
        assert float64_norm(gradients(parameters)) == pytest.approx(steps.total_norm, rel=1e-5)
        calls[name]()
        left = steps.total_norm / (1 if name == "cpu" else 2)
        assert float64_norm(gradients(parameters)) == pytest.approx(left, rel=1e-5)
    assert steps.norm_error("cpu") < 2e-7
    # The step that made the state was one more.
    states = [steps.torch[name].state[parameters[0]] for name in (FUSED, DEFAULT)]
    states.append(steps.clipped["cpu"].state[parameters[0]])
    assert [state["step"] for state in states] == [2, 3, 2]
    assert all(state["exp_avg"] is states[0]["exp_avg"] for state in states)


def test_as_many_layers_as_fit() -> None:
    gib = 2**30
    depths = [sections.fitting_depth(n * gib) for n in (1, 16, 40, 78, 140)]
    assert depths == sorted(depths)
    assert depths[0] == 0
    assert 20 <= depths[3] < sections.LLAMA_DEPTH
    assert depths[4] == sections.LLAMA_DEPTH


@pytest.mark.parametrize("kind", STEP_KINDS.values(), ids=STEP_KINDS)
def test_captures_are_checked(kind: Any) -> None:
    workload = DRY_WORKLOADS[-1]
    check(workload, workload.dtype, [captured(FASTCLIP, WithGraphs())], device=WithGraphs())
    check_captured_step(workload, kind, device=WithGraphs(), backend="cpu")
    with pytest.raises(CheckError, match="the norm returned by an inactive clip by fastclip_graph"):
        check(workload, workload.dtype, [captured(FASTCLIP, WithoutReplay())])
    with pytest.raises(CheckError, match="differ from a step's"):
        check_captured_step(workload, kind, device=WithoutReplay(), backend="cpu")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_the_first_step_is_checked_in_every_dtype(dtype: str) -> None:
    workload = models.Workload("w", "w", ((300, 70), (65,)), dtype)
    for kind in STEP_KINDS.values():
        assert 0 < check_first_step(workload, kind, backend="cpu") <= 1


def test_a_backend_is_checked_and_its_launches_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = {"kernels": 3, "copies": 0, "waits": 0}
    monkeypatch.setattr(launches, "counts_of", lambda call: (call() and None) or counts)
    running = section(tmp_path, WithGraphs())
    sections.check_backend(running)
    checks = running.found["checks"]["cpu"]
    assert checks["failed"] == {"launches": "CheckError: norm of 1 tensors: 3 kernels; expected at most 2."}
    assert checks["step_launches"]["SGD of 2000"] == counts
    assert {"dry-mixed", "step adamw dry-bf16", "capture", "step adamw capture"} <= set(checks["parts"])
    counts["kernels"], counts["waits"] = 2, 1
    with pytest.raises(CheckError, match="AdamW of 1 tensors: 1 waits"):
        launches.check_step_launches(Dry(), "cpu")


def test_a_workload_that_is_too_large_or_too_late_is_named(tmp_path: Path) -> None:
    running = section(tmp_path)
    running.device.is_accelerator = True
    assert not running.fits("big", DEVICE_WORKLOADS[0])
    assert "bytes of free memory" in running.found["left_out"]["big"]
    running = Section(Dry(), tmp_path / "found.json", 1.0, False, ["cpu"], {})
    assert not running.fits("late", DRY_WORKLOADS[0])
    assert running.found["left_out"] == {"late": "no time left"}


@pytest.mark.parametrize(
    ("warning", "error"),
    [
        ("Synchronization debug mode is a prototype feature", ZeroDivisionError),
        ("something else", UserWarning),  # is an error, and leaves no mode behind either
    ],
)
def test_what_fails_leaves_no_mode_behind(
    warning: str, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: list[int | str] = [0]

    def set_mode(mode: int | str) -> None:
        modes.append(mode)
        if mode == "error" or "prototype" in warning:
            warnings.warn(warning, stacklevel=2)

    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    with pytest.raises(error), launches.forbidden_waits():
        1 / 0  # noqa: B018
    assert modes == [0, "error", 0]


def test_that_benchmarks_are_off_in_several_processes_is_no_error() -> None:
    warnings.warn("Benchmarks are automatically disabled because xdist plugin is active.", stacklevel=1)


def test_a_row_runs_the_backend_whose_name_it_carries() -> None:
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
    assert launches.count_events(events) == {"kernels": 1, "copies": 0, "waits": 0}
    more = [event("cudaMemcpyAsync", 0, on_device=False), event("Memcpy HtoD", 1, on_device=True)]
    assert launches.count_events([*events, *more]) == {"kernels": 1, "copies": 1, "waits": 1}


def test_the_profiler_says_what_is_an_annotation() -> None:
    with torch.profiler.profile(acc_events=True) as profiler, torch.profiler.record_function("a region"):
        torch.ones(3).sum()
    kinds = {event.name: event.is_user_annotation for event in profiler.events()}
    assert kinds["a region"]
    assert not kinds["aten::sum"]


def test_what_failed_its_checks_is_not_timed(tmp_path: Path) -> None:
    failed = {
        "cuda": {"capture": "x", "step_launches": "4 kernels"},
        "triton": {"step adamw gpt2": "x", "step adamw capture": "x"},
        "cpu": {"process": "exit code -11"},
    }
    checks = {name: {"failed": parts} for name, parts in failed.items()}
    of_clips, of_steps = (unproven_peers(checks, of_steps=of_steps) for of_steps in (False, True))
    assert set(of_clips) == {"cuda_graph", "cpu", "cpu_graph"}
    assert set(of_steps) == {"triton", "triton_graph", "cpu", "cpu_graph"}
    clips, steps = (section(tmp_path, WithGraphs(), unproven) for unproven in (of_clips, of_steps))
    sections.time_clips(clips)
    sections.time_all_steps(steps)
    for row in (*clips.found["clips"], *steps.found["steps"]):
        assert not {"cpu", "cpu_graph"} & set(row["device_ms"])
        assert row["left_out"]["cpu"] == "process failed: exit code -11"
        assert len(set(row["device_ms"]) - {"torch_foreach_graph"}) == 2  # torch's are there


def test_a_capture_that_failed_is_left_out_alone(tmp_path: Path) -> None:
    running = section(tmp_path, WithGraphs(), {"cpu_graph": "capture failed: x"})
    (row, *_) = [r for r in sections.clip_rows(running, DRY_WORKLOADS[0]) if r.mode == "active"]
    assert set(row.measurements) == {"cpu", "torch_foreach", "torch_loop", "torch_foreach_graph"}


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
    complaint = suite.watch([sys.executable, "-c", program], 2.0)
    assert complaint is not None
    assert complaint.startswith("took more than 2 s: begun")


def test_iterations_train_and_clip() -> None:
    torch.manual_seed(0)
    model = Gpt(DRY)
    indices = torch.randint(DRY.vocabulary, (DRY.batch, DRY.length + 1))
    before = model(indices).item()
    calls, clipped = iterations(model, indices, Dry())
    assert list(calls) == ["none", "torch", "fastclip", "clipped", "clipped_fused"]
    for call in calls.values():
        call()
    assert model(indices).item() < before
    for optimizer in clipped.values():
        assert optimizer.route == "native"
        assert optimizer.stats().steps == 4
    with torch.device("meta"):
        assert sum(p.numel() for p in Gpt(GPT2).parameters()) == 124_439_808


@pytest.mark.parametrize(
    ("arguments", "complaint", "code"),
    [
        (
            ["--device", "cuda", "--section", "clips"],
            "Error: --device cuda: torch sees no GPU. Run on one",
            1,
        ),
        (["--device", "cuda", "--models", "tiny", "--steps"], "--models, --steps: not with --device cuda", 2),
        (["--section", "clips"], "--section: only with --device cuda", 2),
        (["--device", "cuda", "--section", "clip"], "expected one or more of checks, clips, steps", 2),
    ],
)
def test_the_command_says_what_it_cannot_do(
    arguments: list[str], complaint: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(cli.cli, ["bench", *arguments])
    assert result.exit_code == code
    assert complaint in result.output
    assert code == 2 or result.output.count("\n") == 1


def test_the_thin_command_passes_its_arguments_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    taken: list[suite.SuiteOptions] = []
    monkeypatch.setattr(suite, "run_suite", lambda options: taken.append(options) or 3)
    monkeypatch.setattr(gpu, "build", lambda: taken.append(suite.SuiteOptions()))
    path = tmp_path / "x.json"
    for arguments in (
        ["--quick", "--section", "clips", "--json", str(path)],
        ["--cpu-dry-run", "--no-build"],
    ):
        monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])
        assert gpu.main() == 3
    folders = [gpu.ROOT / "benchmarks/results", gpu.ROOT / "build"]
    assert taken[1:] == [
        suite.SuiteOptions(("clips",), quick=True, json_path=path, folder=folders[0]),
        suite.SuiteOptions(dry=True, folder=folders[1]),
    ]


def test_a_run_without_a_gpu_or_with_an_unknown_section_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(suite.NoDeviceError, match="torch sees no GPU"):
        suite.run_suite(suite.SuiteOptions())
    assert suite.SuiteOptions(("steps",)).wanted == {"checks", "steps"}
    assert suite.SuiteOptions(("distributed",)).wanted == {"distributed"}
    with pytest.raises(ValueError, match="no section 'clip'; expected one of checks, clips"):
        suite.run_suite(suite.SuiteOptions(("clip",), dry=True))
