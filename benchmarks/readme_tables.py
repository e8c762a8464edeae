"""The README's tables, each from the files in one folder of results."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fastclip.bench.environment import Environment
from fastclip.bench.results import Results, Row, load
from fastclip.bench.steps import DEFAULT, FUSED, SUBJECT
from fastclip.bench.table import digits

PEER = "torch_foreach"
CPU_ROWS = (("gpt2", "float32"), ("resnet50", "float32"), ("gpt2", "bfloat16"), ("tiny", "float32"))
CPU_COLUMNS = (
    "gradients",
    "nothing to clip: torch",
    "fastclip",
    "",
    "all scaled: torch",
    "fastclip",
    "",
    "error of the norm: torch",
    "fastclip",
)
STEP_COLUMNS = (
    "parameters",
    "optimizer, clipping",
    "clip + fused step",
    "clip + default step",
    "fastclip",
    "vs fused",
    "vs default",
)
GPU_COLUMNS = ("gradients", "mode", "torch foreach", "fastclip", "", "GB/s", "of a copy")
GPU_STEP_COLUMNS = (*STEP_COLUMNS, "GB/s", "of a copy")
TUNER_COLUMNS = ("what", "measured")


def cpu_table(folder: Path) -> str:
    """Return clipping beside torch's, from cpu.json."""
    results = load(folder / "cpu.json")
    flat = results.find("flat", "float32", "norm")
    text = (
        f"Milliseconds (median), and torch's time over fastclip's, on {_machine(results)} with "
        f"`foreach=True`, {_commit(results.environment)}. Errors are relative, against float64. The norm of "
        f"one tensor of {flat.numel:,} float32 elements takes {digits(flat.subject_ms)} ms: "
        f"{flat.gbps:.1f} GB/s, {flat.share:.0%} of the {flat.read_gbps:.1f} GB/s that the fastest plain "
        f"read ({results.bandwidth.read_by}) reached beside it. Both are bound by memory: how far they are "
        f"apart on large models depends on the memory as much as on the code."
    )
    return _markdown(CPU_COLUMNS, (_cpu_cells(results, *row) for row in CPU_ROWS), text)


def steps_table(folder: Path) -> str:
    """Return clip and optimizer step together beside torch's, from cpu_steps.json."""
    results = load(folder / "cpu_steps.json")
    rows = (
        [
            row.title,
            row.mode,
            *(digits(row.measurements[name].median_ms) for name in (FUSED, DEFAULT, SUBJECT)),
            *(f"**{row.ratio(name):.1f}x**" for name in (FUSED, DEFAULT)),
        ]
        for row in results.rows
    )
    gpt2 = results.rows[0]
    text = (
        f"Milliseconds (median) of `torch.nn.utils.clip_grad_norm_` and torch's step, and of "
        f"`ClippedOptimizer.step`, float32, on {_machine(results)}, {_commit(results.environment)}. "
        f"{gpt2.title}, {gpt2.mode}: {gpt2.share:.0%} of the bandwidth measured in the same run."
    )
    return _markdown(STEP_COLUMNS, rows, text, left=2)


def gpu_table(folder: Path) -> str:
    """Return every GPU that benchmarks/gpu.py left a whole run of, or that there is none."""
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("gpu-*.json"))]
    runs = [run for run in runs if run.get("rows") and not run["dry_run"] and not run["quick"]]
    if not runs:
        return "No GPU has been measured yet; `make gpu` on one writes the table that belongs here."
    return "\n\n".join(_gpu_run(run) for run in runs)


def tuner_table(folder: Path) -> str:
    """Return what the search on the digits reached, from tuner.json."""
    parts = json.loads((folder / "tuner.json").read_text(encoding="utf-8"))
    searches, env = parts["searches"], parts["searches"]["environment"]
    ours, nan = (searches[f"exploded_after_startup_told_{how}"] for how in ("with_constraint", "as_nan"))
    rows = [
        ["test accuracy of the refitted model, per seed", _each(searches["test_accuracy"])],
        [
            "exploded trials in a random search of the same space",
            _each(searches["exploded_in_random_search"]),
        ],
        ["exploded trials after the first 10, told as the worst value with a constraint", _each(ours)],
        ["the same, told as NaN", _each(nan)],
        ["cost of the fold runner beside the bare training loop", f"{parts['overhead']['overhead']:.1%}"],
    ]
    if "jobs" in parts:
        rows.append(["two jobs against one, wall time", f"{parts['jobs']['speedup']:.2f}x"])
    options = searches["options"]
    text = (
        f"Digits CNN, rates up to {options['space']['lr']['high']:g}, {options['n_trials']} TPE trials "
        f"of {options['folds']} folds, seeds {', '.join(map(str, options['seeds']))}; "
        f"{env['hardware']['cpu']}, torch {env['versions']['torch']}, fastclip at commit {env['commit']}, "
        f"{env['date'][:10]}. Told with a constraint, {statistics.mean(ours):.0%} of later trials explode "
        f"instead of {statistics.mean(nan):.0%}."
    )
    return _markdown(TUNER_COLUMNS, rows, text)


def _markdown(columns: Sequence[str], rows: Iterable[Sequence[str]], text: str, *, left: int = 1) -> str:
    rule = [*["---"] * left, *["--:"] * (len(columns) - left)]
    return "\n".join([*(f"| {' | '.join(row)} |" for row in (columns, rule, *rows)), "", text])


def _machine(results: Results) -> str:
    env, hardware = results.environment, results.environment.hardware
    threads = results.options["threads"]
    return f"{hardware.cpu}, {threads} threads, {hardware.instruction_set}; torch {env.versions['torch']}"


def _commit(env: Environment) -> str:
    return f"fastclip at commit {env.commit}, {env.date[:10]}"


def _each(shares: Iterable[float]) -> str:
    return ", ".join(f"{share:.1%}" for share in shares)


def _cpu_cells(results: Results, model: str, dtype: str) -> list[str]:
    inactive, active = (results.find(model, dtype, mode) for mode in ("inactive", "active"))
    errors = inactive.relative_errors
    return [
        f"{inactive.title}, {dtype}",
        *_times(inactive),
        *_times(active),
        f"{errors[PEER]:.1e}",
        f"{errors[inactive.subject]:.1e}",
    ]


def _times(row: Row) -> list[str]:
    return [
        digits(row.measurements[PEER].median_ms),
        digits(row.subject_ms),
        f"**{row.ratio(PEER):.1f}x**",
    ]


def _gpu_run(run: dict[str, Any]) -> str:
    env, backend = run["environment"], next(iter(run["checks"]))
    text = (
        f"Milliseconds on the device (median, cold caches) on an {env['gpu']}, driver {env['driver']}, torch "
        f"{env['torch']} with `foreach=True`, fastclip's {backend} backend at commit {env['commit']}, "
        f"{env['date'][:10]}. A device-to-device copy reached {run['copy_gbps']:.0f} GB/s in the same run."
    )
    rows = (_gpu_cells(row, backend, run["copy_gbps"]) for row in run["rows"])
    clips = _markdown(GPU_COLUMNS, rows, text, left=2)
    if not run["step_rows"]:
        return clips
    text = (
        "The same of `torch.nn.utils.clip_grad_norm_` and torch's step, and of `ClippedOptimizer.step`, in "
        "the same run."
    )
    steps = (_gpu_step_cells(row, backend, run["copy_gbps"]) for row in run["step_rows"])
    return f"{clips}\n\n{_markdown(GPU_STEP_COLUMNS, steps, text, left=2)}"


def _gpu_cells(row: dict[str, Any], backend: str, copy_gbps: float) -> list[str]:
    ours, theirs = (row["device_ms"][peer]["50"] for peer in (backend, "torch_foreach"))
    gbps = row["gbps"][backend]
    return [
        *(row["title"], row["mode"], digits(theirs), digits(ours)),
        *(f"**{theirs / ours:.1f}x**", f"{gbps:.0f}", f"{gbps / copy_gbps:.0%}"),
    ]


def _gpu_step_cells(row: dict[str, Any], backend: str, copy_gbps: float) -> list[str]:
    times = {peer: row["device_ms"][peer]["50"] for peer in (FUSED, DEFAULT, backend)}
    gbps = row["gbps"][backend]
    return [
        *(row["title"], row["mode"], *map(digits, times.values())),
        *(f"**{times[peer] / times[backend]:.1f}x**" for peer in (FUSED, DEFAULT)),
        *(f"{gbps:.0f}", f"{gbps / copy_gbps:.0%}"),
    ]
