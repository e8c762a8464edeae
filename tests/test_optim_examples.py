"""The examples run as they stand, and show what they promise."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


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
    run = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / f"{name}.py")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert re.search(promise, run.stdout), run.stdout


@pytest.mark.parametrize(
    ("name", "ranks", "promise"),
    [
        ("distributed_ddp", 2, r"accuracy 0\.9[0-9]+ on 2 ranks: .* 1 skipped"),
        ("distributed_fsdp1", 2, r"accuracy 0\.9[0-9]+ on 2 ranks: .* 1 skipped"),
        ("distributed_fsdp2_tensor_parallel", 4, r"accuracy 0\.9[0-9]+ on 4 ranks; .* whole: True"),
        ("distributed_fsdp2", 2, r"accuracy 0\.9[0-9]+ on 2 ranks: .* 1 skipped"),
        ("distributed_pipeline", 2, r"equal: True"),
        ("distributed_hsdp", 4, r"accuracy 0\.9[0-9]+ on 4 ranks: .* 1 skipped"),
        ("distributed_tensor_parallel", 2, r"accuracy 0\.9[0-9]+ on 2 ranks; .* whole: True"),
        ("distributed_experts", 2, r"accuracy 0\.9[0-9]+ on 2 ranks; one norm on all: True"),
    ],
)
def test_distributed_example(name: str, ranks: int, promise: str) -> None:
    run = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"),
            str(ranks),
            str(EXAMPLES / f"{name}.py"),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    assert re.search(promise, run.stdout), run.stdout
