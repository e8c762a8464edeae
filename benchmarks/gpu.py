"""Check fastclip on a GPU, then time it: one command, no network, no installation, at most ten minutes.

    make gpu                                       # builds, checks, times, writes results/gpu-NAME.json
    python benchmarks/gpu.py --quick               # three minutes: checks, key workloads, steps, training
    python benchmarks/gpu.py --section checks      # one section; may be given several times
    python benchmarks/gpu.py --cpu-dry-run         # every line that needs no GPU; its times mean nothing
    python benchmarks/gpu.py --plot FILE.json      # draws a run that was written before

`fastclip bench --device cuda` with what this checkout needs: it builds in place, with torch >= 2.10, numpy,
pybind11 and setuptools, and with triton and nvcc for the backends that they make. The whole proof is
`pytest -m cuda`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def main() -> int:
    """Run everything; return the exit code."""
    options = parse_arguments()
    if options.build and not options.plot:
        build()
    from fastclip.bench import suite

    if options.plot:
        suite.plot(options.plot)
        return 0
    try:
        return suite.run_suite(
            suite.SuiteOptions(
                sections=tuple(options.section),
                quick=options.quick,
                dry=options.cpu_dry_run,
                json_path=options.json,
                folder=ROOT / ("build" if options.cpu_dry_run else "benchmarks/results"),
            )
        )
    except suite.NoDeviceError as error:
        raise SystemExit(f"gpu.py: {error}") from error


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="correctness and the key workloads")
    parser.add_argument("--section", action="append", default=[], help="only this one; may be repeated")
    parser.add_argument("--cpu-dry-run", action="store_true", help="use the CPU in place of the GPU")
    parser.add_argument("--no-build", dest="build", action="store_false", help="use what is built already")
    parser.add_argument(
        "--json", type=Path, help="where to write; by default benchmarks/results/gpu-NAME.json"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.json", help="draw a run, beside its file")
    return parser.parse_args()


def build() -> None:
    """Build the extension and the CUDA library in place, as far as the compilers are there."""
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    subprocess.run(command, cwd=ROOT, env={"FASTCLIP_BUILD_CUDA": "auto", **os.environ}, check=True)


if __name__ == "__main__":
    sys.exit(main())
