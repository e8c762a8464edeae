"""The README's tables, each from the files in one folder of results."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from fastclip.bench.environment import Environment
from fastclip.bench.results import MIN_NBYTES, Results, Row, load, quoted_backend
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
GPU_PEERS = {
    "torch_foreach": "torch",
    "apex": "Apex",
    "transformer_engine": "TransformerEngine",
    "nemo": "NeMo",
}
"""Whom clipping on a GPU is timed beside, in the order of the columns."""
GPU_FIRST = ("llama3-8b", "gpt2", "resnet50", "2000-tiny")
"""Workloads of the README; benchmarks/README.md has all of them."""
GPU_STEP_COLUMNS = (*STEP_COLUMNS, "of a copy", "host: fused", "fastclip")
TRAINED = "gpt2-124m"
"""The iteration of which the README quotes the cost of clipping."""
DISTRIBUTED_COLUMNS = ("DTensors", "what", "torch", "fastclip", "")
TUNER_COLUMNS = ("what", "measured")
MONITOR_COLUMNS = ("`Monitor` with", "ms per step", "of a training step", "of clip and update")


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
    headline = _headline(results.environment.hardware.cpu, _cpu_times(results))
    return f"{headline}\n\n{_markdown(CPU_COLUMNS, (_cpu_cells(results, *row) for row in CPU_ROWS), text)}"


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
    """Return clipping beside the peers on every GPU that benchmarks/gpu.py left a whole run of."""
    return _each_gpu(folder, _gpu_first)


def gpu_steps_table(folder: Path) -> str:
    """Return clip and optimizer step together on the same GPUs."""
    return _each_gpu(folder, _gpu_steps)


def gpu_all_table(folder: Path) -> str:
    """Return every workload and mode on the same GPUs, what `torch.compile` makes of some, and DTensors."""
    return _each_gpu(folder, _gpu_all)


def distributed_table(folder: Path) -> str:
    """Return clipping and stepping over DTensors beside torch's, from cpu_distributed.json."""
    results = json.loads((folder / "cpu_distributed.json").read_text(encoding="utf-8"))
    rows = []
    for row in results["rows"]:
        for peer, ratio in row["derived"]["ratios"].items():
            medians = (row["measurements"][name]["quantiles_ms"]["50"] for name in (peer, "fastclip"))
            name = row["what"] + peer.removeprefix("torch").replace("_", ", torch's ")
            rows.append([str(row["num_tensors"]), name, *map(digits, medians), f"{ratio:.1f}x"])
    env = results["environment"]
    text = (
        f"DTensors of 64 x 64 float32 on a mesh of one rank, nothing clipped, warm, milliseconds (median); "
        f"{env['hardware']['cpu']}, {results['threads']} thread(s), torch {env['versions']['torch']}, "
        f"fastclip at commit {env['commit']}, {env['date'][:10]}. The first call over 2000 takes "
        f"{results['first_call_ms']:.1f} ms."
    )
    return _markdown(DISTRIBUTED_COLUMNS, rows, text)


def strategies_table(folder: Path) -> str:
    """Return how every strategy ends as it comes, and what its step costs, from strategies.json."""
    results = json.loads((folder / "strategies.json").read_text(encoding="utf-8"))
    scores = results["scores"]
    trials = list(dict.fromkeys((s["task"], s["condition"], s["rate"]) for s in scores))
    by_name: dict[str, dict[tuple[str, str, float], dict[str, Any]]] = {}
    for score in scores:
        trial = score["task"], score["condition"], score["rate"]
        by_name.setdefault(score["contender"], {})[trial] = score
    rows = [
        [f"`{name}`" if "(" in name else name, *(_mean_of_seeds(found[trial]) for trial in trials)]
        for name, found in by_name.items()
    ]
    columns = ["max_norm", *(f"{task} at {rate:g}: {condition}" for task, condition, rate in trials)]
    env = results["environment"]
    text = (
        f"Test accuracy on the digits, and bits per character of held-out text (less is better): mean over "
        f"{len(results['seeds'])} seeds, lowest and highest in brackets. SGD at the rate that is given; "
        f"{env['hardware']['cpu']}, torch {env['versions']['torch']}, fastclip at commit {env['commit']}, "
        f"{env['date'][:10]}."
    )
    return _markdown(columns, rows, text)


def strategy_costs_table(folder: Path) -> str:
    """Return what the step of each strategy costs beside a fixed threshold, from strategies.json."""
    results = json.loads((folder / "strategies.json").read_text(encoding="utf-8"))
    rows = [
        [f"`{row['strategy']}`", digits(row["measurement"]["quantiles_ms"]["50"]), f"{row['cost']:+.1%}"]
        for row in results["costs"]
    ]
    env = results["costs_environment"]
    text = (
        f"`ClippedOptimizer.step` with AdamW on the parameters of GPT-2 (124M, float32), milliseconds "
        f"(median), {results['threads']} threads; fastclip at commit {env['commit']}, {env['date'][:10]}."
    )
    return _markdown(["max_norm", "ms", "beside fixed"], rows, text)


def _mean_of_seeds(score: dict[str, Any]) -> str:
    known = [value for value in score["scores"] if value is not None]
    if len(known) < len(score["scores"]):
        return "nan"
    return f"{sum(known) / len(known):.3f} ({min(known):.3f}, {max(known):.3f})"


def monitor_table(folder: Path) -> str:
    """Return what the monitor costs of a training step, from monitor.json."""
    results = json.loads((folder / "monitor.json").read_text(encoding="utf-8"))
    rows = [
        [
            "defaults" if name == "default" else f"`{name}`",
            digits(1e3 * found["monitor_seconds"]),
            f"{found['share_of_step']:.2%}",
            f"{found['share_of_clip_and_update']:.2%}",
        ]
        for name, found in results["results"].items()
    ]
    settings, env = results["settings"], results["environment"]
    steps = [found["step_seconds"] for found in results["results"].values()]
    text = (
        f"GPT-2 124M in float32 with AdamW, {settings['tokens']} tokens per step, which took "
        f"{min(steps):.1f} to {max(steps):.1f} s; mean over {settings['steps']} steps, their block written; "
        f"{env['hardware']['cpu']}, {settings['threads']} threads; torch "
        f"{env['versions']['torch']}, fastclip at commit {env['commit']}, {env['date'][:10]}."
    )
    return _markdown(MONITOR_COLUMNS, rows, text)


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


def _cpu_times(results: Results) -> dict[str, tuple[str, float, float]]:
    model, dtype = CPU_ROWS[0]
    rows = (results.find(model, dtype, mode) for mode in ("inactive", "active"))
    return {
        row.mode: (f"{row.title}, {dtype}", row.measurements[PEER].median_ms, row.subject_ms) for row in rows
    }


def _times(row: Row) -> list[str]:
    return [
        digits(row.measurements[PEER].median_ms),
        digits(row.subject_ms),
        f"**{row.ratio(PEER):.1f}x**",
    ]


def _each_gpu(folder: Path, describe: Callable[[dict[str, Any]], str]) -> str:
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("gpu-*.json"))]
    runs = [run for run in runs if run.get("clips") and not run["dry_run"] and not run["quick"]]
    if not runs:
        return "No GPU has been measured yet; `make gpu` on one writes the table that belongs here."
    return "\n\n".join(describe(run) for run in runs)


def _gpu_first(run: dict[str, Any]) -> str:
    env, backend = run["environment"], quoted_backend(run)
    rows = [row for row in run["clips"] if row["workload"] in GPU_FIRST and row["mode"] != "norm"]
    headline = _headline(env["gpu"], _gpu_times(rows, backend)) + _training_cost(run)
    text = (
        f"Milliseconds (median): on the device with cold caches, then of the host until the call returns. "
        f"Driver {env['driver']}, torch {env['torch']} with `foreach=True`, fastclip's {backend} backend at "
        f"commit {env['commit']}, {env['date'][:10]}{_measured_with(run)}. A device-to-device copy reached "
        f"{run['copy_gbps']:.0f} GB/s. Tiny tensors move next to nothing: there, only the host's time counts."
    )
    return f"{headline}\n\n{_gpu_clips(run, rows, text)}"


def _headline(machine: str, times: dict[str, tuple[str, float, float]]) -> str:
    """Return one line from the times of one list, without and with clipping: title, torch's, fastclip's."""
    (title, *inactive), (_, *active) = (times[mode] for mode in ("inactive", "active"))
    torch_inactive, inactive_ms, torch_active, active_ms = map(digits, (*inactive, *active))
    return (
        f"**{machine}.** Clipping {title}: {inactive_ms} ms where the norm is below the threshold (torch "
        f"{torch_inactive}), {active_ms} ms where every gradient is scaled (torch {torch_active})."
    )


def _gpu_times(rows: list[dict[str, Any]], backend: str) -> dict[str, tuple[str, float, float]]:
    first = rows[0]["workload"]
    return {
        row["mode"]: (row["title"], *(row["device_ms"][peer]["50"] for peer in (PEER, backend)))
        for row in rows
        if row["workload"] == first
    }


def _training_cost(run: dict[str, Any]) -> str:
    for row in run.get("training", ()):
        if row["workload"] == TRAINED and not row["compiled"]:
            ms = {peer: quantiles["50"] for peer, quantiles in row["ms"].items()}
            cost = {peer: f"{ms[peer] / ms['none'] - 1:.2%}" for peer in ("clipped", "fastclip", "torch")}
            return (
                f" Of a whole training iteration of {row['title']} in bfloat16 autocast "
                f"({digits(ms['none'])} ms), clipping costs **{cost['clipped']}** with `ClippedOptimizer`, "
                f"{cost['fastclip']} with `fastclip.clip_grad_norm_` and {cost['torch']} with torch's."
            )
    return ""


def _measured_with(run: dict[str, Any]) -> str:
    return f" ({run['measured_with'].rstrip('.')})" if run.get("measured_with") else ""


def _gpu_clips(run: dict[str, Any], rows: list[dict[str, Any]], text: str) -> str:
    backend = quoted_backend(run)
    peers = [peer for peer in GPU_PEERS if any(peer in row["device_ms"] for row in rows)]
    names = [*(GPU_PEERS[peer] for peer in peers), "fastclip"]
    columns = ["gradients", "clipping", *names, "", "of a copy", f"host: {names[0]}", *names[1:]]
    cells = []
    for row in rows:
        device = [_median(row, peer) for peer in (*peers, backend)]
        host = [_median(row, peer, "host_ms") for peer in (*peers, backend)]
        ratio = row["device_ms"][PEER]["50"] / row["device_ms"][backend]["50"]
        share = _share(row, backend, run["copy_gbps"])
        cells.append([row["title"], row["mode"], *device, f"**{ratio:.1f}x**", share, *host])
    return _markdown(columns, cells, text, left=2)


def _gpu_steps(run: dict[str, Any]) -> str:
    if not run.get("steps"):
        return "No steps were timed."
    env, backend = run["environment"], quoted_backend(run)
    text = (
        f"The same on an {env['gpu']}: milliseconds on the device, then of the host. The state is torch's, "
        f"so the update moves what torch's fused step moves."
    )
    cells = (_gpu_step_cells(row, backend, run["copy_gbps"]) for row in run["steps"])
    return _markdown(GPU_STEP_COLUMNS, cells, text, left=2)


def _gpu_all(run: dict[str, Any]) -> str:
    env = run["environment"]
    text = (
        f"On an {env['gpu']}, fastclip at commit {env['commit']}{_measured_with(run)}; columns as in the "
        f"README."
    )
    parts = [_gpu_clips(run, run["clips"], text)]
    parts += [_compiled(run)] if run.get("compiled") else []
    parts += [_distributed(run)] if run.get("distributed") else []
    return "\n\n".join(parts)


def _compiled(run: dict[str, Any]) -> str:
    names = {PEER: "torch foreach", "torch_compile": "torch.compile", quoted_backend(run): "fastclip"}
    names |= {f"{PEER}_graph": "graph: torch foreach", f"{quoted_backend(run)}_graph": "graph: fastclip"}
    cells = [[row["title"], row["mode"], *(_median(row, peer) for peer in names)] for row in run["compiled"]]
    text = (
        "Milliseconds on the device beside torch's clip through `torch.compile`, and captured in CUDA graphs."
    )
    return _markdown(["gradients", "clipping", *names.values()], cells, text, left=2)


def _distributed(run: dict[str, Any]) -> str:
    parts = []
    for row in run["distributed"]:
        cells = [[peer, digits(quantiles["50"])] for peer, quantiles in row["host_ms"].items()]
        cells += [[peer, f"failed: {reason}"] for peer, reason in row.get("failed", {}).items()]
        parts.append(_markdown(["clipping", "ms on the host"], cells, f"{row['title']}."))
    return "\n\n".join(parts)


def _median(row: dict[str, Any], peer: str, clock: str = "device_ms") -> str:
    times = row[clock].get(peer)
    return digits(times["50"]) if times else ""


def _share(row: dict[str, Any], backend: str, copy_gbps: float) -> str:
    """Return the part of a copy's bandwidth; nothing of lists that move next to nothing."""
    if row["nbytes"] < MIN_NBYTES:
        return ""
    return f"{row['gbps'][backend] / copy_gbps:.0%}"


def _gpu_step_cells(row: dict[str, Any], backend: str, copy_gbps: float) -> list[str]:
    times = {peer: row["device_ms"][peer]["50"] for peer in (FUSED, DEFAULT, backend)}
    return [
        *(row["title"], row["mode"], *map(digits, times.values())),
        *(f"**{times[peer] / times[backend]:.1f}x**" for peer in (FUSED, DEFAULT)),
        _share(row, backend, copy_gbps),
        *(_median(row, peer, "host_ms") for peer in (FUSED, backend)),
    ]
