"""Every Triton kernel compiled for devices that are not here: wide accesses, no spills, no recompilation."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton (pip install 'fastclip[gpu]')"
)

# One process per group: the cores are two, and each takes about half of the time.
GROUPS = (("sm_80", "sm_90", "gfx942"), ("sm_100", "sm_120"))
TARGETS = [name for group in GROUPS for name in group]
every_target = pytest.mark.parametrize("target", TARGETS)

READERS = (
    "total_norm_two",
    "total_norm_one",
    "total_norm_inf",
    "total_norm_any",
    "scale",
    "clamp",
    "nonfinite",
)
"""One of each body that reads gradients; chunk_norms_* reads as total_norm_* does."""


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Target -> variant -> description, see triton_compile.py."""
    root = Path(__file__).parents[1]
    environment = {
        **os.environ,
        "PYTHONPATH": str(root),
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
    }
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(root / "tests" / "triton_compile.py")]
    processes = [
        subprocess.Popen(
            [*command, *group], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for group in GROUPS
    ]
    result: dict[str, Any] = {}
    for process in processes:
        output, errors = process.communicate()
        assert process.returncode == 0, errors
        result.update(json.loads(output))
    return result


@every_target
def test_nothing_spills(compiled: dict[str, Any], target: str) -> None:
    assert {name: d["spilled_nbytes"] for name, d in compiled[target].items() if d["spilled_nbytes"]} == {}


@every_target
def test_the_norm_leaves_registers_for_six_programs(compiled: dict[str, Any], target: str) -> None:
    """65536 registers, 4 warps of 32 threads, 6 programs; see launch.py. Compute units have twice as many."""
    for kind in ("one", "two", "inf"):
        assert compiled[target][f"total_norm_{kind}"]["registers"] <= (
            128 if target.startswith("gfx") else 80
        )


@every_target
@pytest.mark.parametrize("variant", READERS)
def test_accesses_are_16_bytes_wide(compiled: dict[str, Any], target: str, variant: str) -> None:
    """Each dtype has a tile of wide accesses; what is narrower belongs to edges, table and rare paths."""
    accesses = compiled[target][variant]["accesses"]
    # Vectors per thread, see launch.py.
    per_thread = 1 if variant.endswith("any") else 4
    if target.startswith("gfx"):
        assert accesses["global_load_dwordx4"] >= 4 * per_thread
        assert accesses.get("global_store_dwordx4", 0) >= (
            4 * per_thread if variant in ("scale", "clamp") else 0
        )
        return
    # float32, bfloat16 and float16, then float64.
    assert accesses["ld.global.v4.b32"] == 3 * per_thread
    assert accesses["ld.global.v2.b64"] == per_thread
    if variant in ("scale", "clamp"):
        assert accesses["st.global.v4.b32"] == 3 * per_thread
        assert accesses["st.global.v2.b64"] == per_thread


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


def test_no_integer_argument_is_specialized(compiled: dict[str, Any]) -> None:
    for target in TARGETS:
        assert {name: d["specialized"] for name, d in compiled[target].items() if d["specialized"]} == {}
