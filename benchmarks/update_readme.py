"""Write the tables of README.md and benchmarks/README.md from results files: no figure is typed by hand.

make bench                                    # writes benchmarks/results/cpu.json and cpu_steps.json
python benchmarks/update_readme.py            # rewrites what stands between the markers
python benchmarks/update_readme.py --check    # exits with 1 if that is not what the files say
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import readme_tables

from fastclip.bench.results import ResultsError
from fastclip.files import write_whole

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = {
    ROOT / "README.md": ("gpu", "cpu", "steps", "gpu-steps", "tuner", "distributed"),
    ROOT / "benchmarks" / "README.md": ("gpu-all",),
    ROOT / "docs" / "strategies.md": ("strategies", "strategy-costs"),
    ROOT / "docs" / "monitor.md": ("monitor",),
}
"""What is rewritten unless --readme and --tables say otherwise: names in the markers."""
TABLES = {
    name: getattr(readme_tables, f"{name.replace('-', '_')}_table")
    for names in DOCUMENTS.values()
    for name in names
}
"""Name -> function of the folder of results that returns Markdown."""


class ReadmeError(Exception):
    """The README has no place for a table."""


def markers(name: str) -> tuple[str, str]:
    """Return the lines between which a table stands."""
    return f"<!-- bench:{name}:begin -->", f"<!-- bench:{name}:end -->"


def replace(readme: str, name: str, content: str) -> str:
    """Return the README with the part between the markers of a table replaced.

    Raises:
        ReadmeError: The markers are not there, or not in order.
    """
    begin_mark, end_mark = markers(name)
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
    parser.add_argument("--readme", type=Path, help="one file in place of all")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder")
    parser.add_argument("--tables", nargs="+", choices=sorted(TABLES), help="of that file; else README.md's")
    options = parser.parse_args(arguments)
    documents = DOCUMENTS
    if options.readme or options.tables:
        readme = options.readme or ROOT / "README.md"
        documents = {readme: options.tables or DOCUMENTS[ROOT / "README.md"]}
    return max(_update(path, tables, options) for path, tables in documents.items())


def _update(path: Path, tables: Sequence[str], options: argparse.Namespace) -> int:
    if not path.is_file():
        return _fail(f"{path}: no such file. Name the README with --readme.")
    before = updated = path.read_text(encoding="utf-8")
    try:
        for name in tables:
            updated = replace(updated, name, TABLES[name](options.results))
    except ReadmeError as error:
        return _fail(f"{path}: {error}")
    except FileNotFoundError as error:
        return _fail(f"{error.filename}: no such file. Measure first, or leave its table out with --tables.")
    except ResultsError as error:
        return _fail(str(error))
    if updated == before:
        print(f"{path} is up to date")
    elif options.check:
        return _fail(f"{path} differs from {options.results}. Run benchmarks/update_readme.py.")
    else:
        write_whole(path, updated.encode())
        print(f"wrote {path}")
    return 0


def _fail(message: str) -> int:
    print(f"update_readme: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
