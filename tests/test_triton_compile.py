"""Every Triton kernel compiled for devices that are not here: wide accesses, no spills, no recompilation."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from compiled import KEPT

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton (pip install 'fastclip[gpu]')"
)

# One process per group: those of NVIDIA share most of the work, and the cores are two.
GROUPS = (("sm_90", "sm_80", "sm_100", "sm_120"), ("gfx942",))
TARGETS = [name for group in GROUPS for name in group]
every_target = pytest.mark.parametrize("target", TARGETS)

READERS = ("total_norm_two", "total_norm_one", "total_norm_inf", "scale", "clamp", "nonfinite")
"""One of each body that reads gradients; chunk_norms_* reads as total_norm_* does, p = any is arithmetic."""

PER_THREAD = 4
"""Vectors of a tile that each thread has in flight; see blocks.py."""


@pytest.fixture(scope="session")
def compiled() -> dict[str, Any]:
    """Target -> variant -> description, see triton_compile.py.

    Triton keeps what it has compiled, by all that a kernel is made of, for the next run.
    """
    root = Path(__file__).parents[1]
    environment = {
        **os.environ,
        "PYTHONPATH": str(root),
        "TRITON_CACHE_DIR": str(KEPT / "triton"),
    }
    environment.pop("TRITON_INTERPRET", None)

    def compile_group(group: tuple[str, ...]) -> dict[str, Any]:
        command = [sys.executable, str(root / "tests" / "triton_compile.py"), *group]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    with ThreadPoolExecutor() as pool:
        return {name: found for group in pool.map(compile_group, GROUPS) for name, found in group.items()}


@every_target
def test_nothing_spills(compiled: dict[str, Any], target: str) -> None:
    assert {name: d["spilled_nbytes"] for name, d in compiled[target].items() if d["spilled_nbytes"]} == {}


@every_target
def test_registers_suffice_for_the_programs_of_a_launch(compiled: dict[str, Any], target: str) -> None:
    for name, described in compiled[target].items():
        assert described["programs"] >= described["programs_of_launch"], name


@every_target
@pytest.mark.parametrize("variant", READERS)
def test_accesses_are_16_bytes_wide(compiled: dict[str, Any], target: str, variant: str) -> None:
    """Each dtype has a tile of wide accesses; what is narrower belongs to edges, table and rare paths."""
    accesses = compiled[target][variant]["accesses"]
    if target.startswith("gfx"):
        assert accesses["global_load_dwordx4"] >= 4 * PER_THREAD
        assert accesses.get("global_store_dwordx4", 0) >= (
            4 * PER_THREAD if variant in ("scale", "clamp") else 0
        )
        return
    # float32, bfloat16 and float16, then float64.
    assert accesses["ld.global.v4.b32"] == 3 * PER_THREAD
    assert accesses["ld.global.v2.b64"] == PER_THREAD
    if variant in ("scale", "clamp"):
        assert accesses["st.global.v4.b32"] == 3 * PER_THREAD
        assert accesses["st.global.v2.b64"] == PER_THREAD


@every_target
@pytest.mark.parametrize("writes_grads", [False, True])
@pytest.mark.parametrize(("kind", "num_memories"), [("adam", 5), ("sgd", 3)])
def test_a_step_accesses_every_memory_16_bytes_wide(
    compiled: dict[str, Any], target: str, kind: str, num_memories: int, writes_grads: bool
) -> None:
    """One vector per thread of gradient, parameter and each state, all but the gradient written."""
    accesses = compiled[target][f"{kind}_step{'_and_write' * writes_grads}"]["accesses"]
    num_written = num_memories - (not writes_grads)
    if target.startswith("gfx"):
        assert accesses["global_load_dwordx4"] >= 4 * num_memories
        assert accesses["global_store_dwordx4"] >= 4 * num_written
        return
    assert accesses["ld.global.v4.b32"] == 3 * num_memories
    assert accesses["ld.global.v2.b64"] == num_memories
    assert accesses["st.global.v4.b32"] == 3 * num_written
    assert accesses["st.global.v2.b64"] == num_written


@every_target
def test_no_floating_point_atomics(compiled: dict[str, Any], target: str) -> None:
    atomics = {name for d in compiled[target].values() for name in d["atomics"]}
    integer = "global_atomic_add_x2" if target.startswith("gfx") else ".add.u64"
    assert atomics
    assert all(name.endswith(integer) for name in atomics)


@pytest.mark.parametrize("target", [t for t in TARGETS if t.startswith("sm")])
def test_the_ticket_orders_the_partial_results(compiled: dict[str, Any], target: str) -> None:
    for kind in ("one", "two", "inf", "any"):
        described = compiled[target][f"total_norm_{kind}"]
        assert described["atomics"] == {"atom.global.gpu.acq_rel.add.u64": 1}
        # Partial results of other programs are read past the first-level cache.
        assert described["accesses"]["ld.global.cg.b64"] > 0


@every_target
def test_no_number_makes_triton_compile_again(compiled: dict[str, Any], target: str) -> None:
    """Neither the number of tensors nor order or threshold; and what is launched is what is tested here."""
    assert [name for name, d in compiled[target].items() if d["compiled_again"]] == []
