"""Write the README's tables from results files, so that no figure there is typed by hand.

fastclip bench --json benchmarks/results/cpu.json
python benchmarks/update_readme.py            # rewrites the part between the markers
python benchmarks/update_readme.py --check    # exits with 1 if that part is not what the file says
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from fastclip.bench.results import Results, ResultsError, Row, load, write_whole
from fastclip.bench.table import digits

ROOT = Path(__file__).resolve().parents[1]
BEGIN = "<!-- bench:cpu:begin -->"
END = "<!-- bench:cpu:end -->"
GPU_BEGIN = "<!-- bench:gpu:begin -->"
GPU_END = "<!-- bench:gpu:end -->"

PEER = "torch_foreach"
ROWS = (("gpt2", "float32"), ("resnet50", "float32"), ("gpt2", "bfloat16"), ("tiny", "float32"))
COLUMNS = (
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


class ReadmeError(Exception):
    """The README has no place for the table."""


def table(results: Results) -> str:
    """Return the Markdown between the markers."""
    rule = ["---", *["--:"] * (len(COLUMNS) - 1)]
    rows = [COLUMNS, rule, *(_cells(results, model, dtype) for model, dtype in ROWS)]
    return "\n".join([*(f"| {' | '.join(row)} |" for row in rows), "", _text(results)])


def _text(results: Results) -> str:
    env, hardware = results.environment, results.environment.hardware
    flat = results.find("flat", "float32", "norm")
    return (
        f"Milliseconds (median), and torch's time over fastclip's, on {hardware.cpu}, "
        f"{results.options['threads']} threads, {hardware.instruction_set}; torch {env.versions['torch']} "
        f"with `foreach=True`, fastclip at commit {env.commit}, {env.date[:10]}. Errors are relative, "
        f"against float64. The norm of one tensor of {flat.numel:,} float32 elements takes "
        f"{digits(flat.subject_ms)} ms: "
        f"{flat.gbps:.1f} GB/s, {flat.share:.0%} of the {flat.read_gbps:.1f} GB/s that the fastest plain "
        f"read ({results.bandwidth.read_by}) reached beside it."
    )


def _cells(results: Results, model: str, dtype: str) -> list[str]:
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


GPU_COLUMNS = ("gradients", "mode", "torch foreach", "fastclip", "", "GB/s", "of a copy")


def gpu_table(folder: Path) -> str:
    """Return the Markdown of every GPU that benchmarks/gpu.py left a whole run of, or that there is none."""
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("gpu-*.json"))]
    runs = [run for run in runs if run.get("rows") and not run["dry_run"] and not run["quick"]]
    if not runs:
        return "No GPU has been measured yet; `make gpu` on one writes the table that belongs here."
    return "\n\n".join(_gpu_run(run) for run in runs)


def _gpu_run(run: dict[str, Any]) -> str:
    env, backend = run["environment"], next(iter(run["checks"]))
    rule = ["---", "---", *["--:"] * (len(GPU_COLUMNS) - 2)]
    rows = [GPU_COLUMNS, rule, *(_gpu_cells(row, backend, run["copy_gbps"]) for row in run["rows"])]
    text = (
        f"Milliseconds on the device (median, cold caches) on an {env['gpu']}, driver {env['driver']}, torch "
        f"{env['torch']} with `foreach=True`, fastclip's {backend} backend at commit {env['commit']}, "
        f"{env['date'][:10]}. A device-to-device copy reached {run['copy_gbps']:.0f} GB/s in the same run."
    )
    return "\n".join([*(f"| {' | '.join(row)} |" for row in rows), "", text])


def _gpu_cells(row: dict[str, Any], backend: str, copy_gbps: float) -> list[str]:
    ours, theirs = (row["device_ms"][peer]["50"] for peer in (backend, "torch_foreach"))
    gbps = row["gbps"][backend]
    return [
        *(row["title"], row["mode"], digits(theirs), digits(ours)),
        *(f"**{theirs / ours:.1f}x**", f"{gbps:.0f}", f"{gbps / copy_gbps:.0%}"),
    ]


def replace(readme: str, content: str, begin_mark: str = BEGIN, end_mark: str = END) -> str:
    """Return the README with the part between the markers replaced.

    Raises:
        ReadmeError: The markers are not there, or not in order.
    """
    before, begin, rest = readme.partition(begin_mark)
    _, end, after = rest.partition(end_mark)
    if not begin or not end:
        raise ReadmeError(
            f"no {begin_mark} followed by {end_mark}. Put both on lines of their own where the table belongs."
        )
    return f"{before}{begin_mark}\n\n{content}\n\n{end_mark}{after}"


def main(arguments: list[str] | None = None) -> int:
    """Rewrite or check the README; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing, exit with 1 on a difference")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "cpu.json")
    options = parser.parse_args(arguments)
    try:
        readme = options.readme.read_text(encoding="utf-8")
        updated = replace(readme, table(load(options.results)))
        if GPU_BEGIN in readme:
            updated = replace(updated, gpu_table(options.results.parent), GPU_BEGIN, GPU_END)
    except FileNotFoundError:
        return _fail(f"{options.readme}: no such file. Name the README with --readme.")
    except ReadmeError as error:
        return _fail(f"{options.readme}: {error}")
    except ResultsError as error:
        return _fail(str(error))
    if updated == readme:
        print(f"{options.readme} is up to date")
    elif options.check:
        return _fail(
            f"{options.readme} differs from {options.results}. Run `python benchmarks/update_readme.py`."
        )
    else:
        write_whole(options.readme, updated.encode())
        print(f"wrote {options.readme}")
    return 0


def _fail(message: str) -> int:
    print(f"update_readme: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
