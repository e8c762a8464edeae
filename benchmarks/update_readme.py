"""Write the README's CPU table from a results file, so that no figure there is typed by hand.

fastclip bench --json benchmarks/results/cpu.json
python benchmarks/update_readme.py            # rewrites the part between the markers
python benchmarks/update_readme.py --check    # exits with 1 if that part is not what the file says
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fastclip.bench.results import Results, ResultsError, Row, load, write_whole
from fastclip.bench.table import digits

ROOT = Path(__file__).resolve().parents[1]
BEGIN = "<!-- bench:cpu:begin -->"
END = "<!-- bench:cpu:end -->"

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


def replace(readme: str, content: str) -> str:
    """Return the README with the part between the markers replaced.

    Raises:
        ReadmeError: The markers are not there, or not in order.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ReadmeError(
            f"no {BEGIN} followed by {END}. Put both on lines of their own where the table belongs."
        )
    return f"{before}{BEGIN}\n\n{content}\n\n{END}{after}"


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
