"""The examples run as they stand, and show what they promise."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from programs import run_python, run_ranks

EXAMPLES = Path(__file__).parents[1] / "examples"

# As `python path` does it, on one thread: several gain nothing on networks this small.
AS_MAIN = """
import os, runpy, sys, warnings
import torch
torch.set_num_threads(1)
warnings.simplefilter({warnings!r})
sys.path.insert(0, os.path.dirname({path!r}))
sys.argv = [{path!r}]
runpy.run_path({path!r}, run_name="__main__")
"""


@pytest.mark.parametrize(
    ("name", "promise"),
    [
        ("plain_loop", r"accuracy 0\.9[3-9].* 1 skipped"),
        ("scheduler", r"accuracy 0\.9[3-9]"),
        ("grad_scaler", r"accuracy 0\.9[3-9].* after [1-9]\d* skipped"),
        ("resume", "the same bits: True"),
        ("strategies", r"MedianMAD\(k=.*: accuracy 0\.9[3-9].* 1 skipped"),
        (
            "monitor",
            r"accuracy 0\.9[3-9].*; 264 steps recorded, 1 skipped; max_norm=\S+ would have clipped 0\.\d%",
        ),
    ],
)
def test_example(name: str, promise: str) -> None:
    run = run_python(AS_MAIN.format(warnings="error", path=str(EXAMPLES / f"{name}.py")))
    assert run.returncode == 0, run.stderr
    assert re.search(promise, run.stdout), run.stdout


@pytest.mark.parametrize(
    ("name", "ranks", "promise"),
    [
        ("distributed_ddp", 2, r"accuracy 0\.9[0-9]+ on 2 ranks: .* 1 skipped"),
        ("distributed_fsdp1", 2, r"accuracy 0\.9[0-9]+ on 2 ranks: .* 1 skipped"),
        ("distributed_fsdp2", 2, r"accuracy 0\.9[0-9]+ on 2 ranks: .* 1 skipped"),
        ("distributed_fsdp2_tensor_parallel", 4, r"accuracy 0\.9[0-9]+ on 4 ranks; .* whole: True"),
        ("distributed_hsdp", 4, r"accuracy 0\.9[0-9]+ on 4 ranks: .* 1 skipped"),
        ("distributed_tensor_parallel", 2, r"accuracy 0\.9[0-9]+ on 2 ranks; .* whole: True"),
        ("distributed_experts", 2, r"accuracy 0\.9[0-9]+ on 2 ranks; one norm on all: True"),
    ],
)
def test_distributed_example(name: str, ranks: int, promise: str) -> None:
    runs = run_ranks(AS_MAIN.format(warnings="default", path=str(EXAMPLES / f"{name}.py")), ranks)
    assert [run.returncode for run in runs] == [0] * ranks, "\n".join(run.stderr for run in runs)
    assert re.search(promise, runs[0].stdout), runs[0].stdout


def test_an_example_runs_with_torchrun() -> None:
    """The one that loads least: torchrun's processes begin from nothing."""
    torchrun = "import sys; from torch.distributed.run import main; main(sys.argv[1:])"
    example = str(EXAMPLES / "distributed_pipeline.py")
    run = run_python(torchrun, "--standalone", "--nproc-per-node", "2", example, OMP_NUM_THREADS="1")
    assert run.returncode == 0, run.stderr
    assert "equal: True" in run.stdout, run.stdout
