"""Compile every Triton kernel ahead of time for devices that need not be there; print what came out as JSON.

A program of its own: one process either compiles Triton's kernels or interprets them.

    python tests/triton_compile.py sm_90 gfx942
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from fastclip.kernels import clamp, launch, nonfinite, norm, scale

CHUNKS = {"chunks": "*i64", "num_chunks": "i32"}
NORM_TYPES = {"one": 1.0, "two": 2.0, "inf": math.inf, "any": 3.0}

CUDA = torch.device("cuda")


class Variant(NamedTuple):
    """A kernel as launch.py launches it."""

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, int]
    threads: int


def variants() -> list[Variant]:
    """Every kernel, the norms once for each kind."""
    found = []
    for name, kernel, arguments in (
        ("scale", scale.scale_kernel, {"coefficient": "*fp64"}),
        ("clamp", clamp.clamp_kernel, {"lo": "fp64", "hi": "fp64"}),
        ("nonfinite", nonfinite.count_nonfinite_kernel, {"counts": "*i64"}),
    ):
        layout = launch.blocks(name, CUDA)
        found.append(Variant(name, kernel, {**CHUNKS, **arguments}, {"ROWS": layout.rows}, layout.threads))
    for returned in ("fp32", "fp64"):
        signature = {"norm": f"*{returned}", "coefficient_out": "*fp64", "max_norm": "fp64"}
        found.append(Variant(f"coefficient_{returned}", norm.coefficient_kernel, signature, {}, 64))
    for name, norm_type in NORM_TYPES.items():
        kind = launch.kind_of(norm_type)
        layout = launch.blocks("total_norm", CUDA, kind)
        signature = {
            **CHUNKS,
            **{"ticket": "*i64", "partials": "*fp64", "norm_out": "*fp32", "coefficient_out": "*fp64"},
            **{"p": "fp64", "max_norm": "fp64", "keep_nonfinite": "i32"},
        }
        constants = {"KIND": kind, "ROWS": layout.rows, "PARTIALS": launch.PARTIALS_OF_LIST}
        found.append(
            Variant(f"total_norm_{name}", norm.total_norm_kernel, signature, constants, layout.threads)
        )

        layout = launch.blocks("chunk_norms", CUDA, kind)
        signature = {**CHUNKS, "partials": "*fp64", "p": "fp64"}
        constants = {"KIND": kind, "ROWS": layout.rows}
        found.append(
            Variant(f"chunk_norms_{name}", norm.chunk_norms_kernel, signature, constants, layout.threads)
        )

        signature = {"partials": "*fp64", "first_chunks": "*i64", "norms_out": "*fp32", "p": "fp64"}
        constants = {"KIND": kind, "PARTIALS": launch.PARTIALS_OF_TENSOR}
        threads = launch.THREADS_OF_TENSOR
        found.append(Variant(f"tensor_norms_{name}", norm.tensor_norms_kernel, signature, constants, threads))
    return found


def compile_variant(target: GPUTarget, variant: Variant) -> Any:
    """Compile as a launch does: torch's allocator aligns what is passed, and no integer is specialized."""
    pointers = [i for i, kind in enumerate(variant.signature.values()) if kind.startswith("*")]
    source = ASTSource(
        variant.kernel,
        signature={**variant.signature, **dict.fromkeys(variant.constants, "constexpr")},
        constexprs=variant.constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in pointers},
    )
    num_warps = launch.num_warps(variant.threads, is_hip=target.backend == "hip")
    return triton.compile(source, target=target, options={"num_warps": num_warps})


def describe_ptx(architecture: int, ptx: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx)
        name = re.search(r"^\.target (\w+)", ptx, re.M)
        assert name
        command = [
            get_ptxas(architecture).path,
            "-v",
            f"--gpu-name={name[1]}",
            str(path),
            "-o",
            f"{path}.cubin",
        ]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    stack, stores, loads = (
        int(found) for found in re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", report)
    )
    return {
        "accesses": Counter(re.findall(r"\b(?:ld|st)\.global(?:\.\w+)*", ptx)),
        "atomics": Counter(re.findall(r"\batom(?:\.\w+)*", ptx)),
        "spilled_nbytes": stack + stores + loads,
        "registers": int(re.findall(r"Used (\d+) registers", report)[0]),
    }


def describe_amdgcn(assembly: str) -> dict[str, Any]:
    def number(pattern: str) -> int:
        return int(re.findall(pattern, assembly)[0])

    return {
        "accesses": Counter(re.findall(r"\b(?:global|flat|buffer)_(?:load|store)_\w+", assembly)),
        "atomics": Counter(re.findall(r"\bglobal_atomic_\w+", assembly)),
        # Scalar registers may be parked in vector registers; that touches no memory.
        "spilled_nbytes": number(r"\.vgpr_spill_count:\s+(\d+)")
        + number(r"\.private_segment_fixed_size: (\d+)"),
        "registers": number(r"\.vgpr_count:\s+(\d+)"),
    }


def specialized_integers(kernel: Any) -> list[str]:
    """Arguments whose value may make Triton compile the kernel again."""
    integers = ("num_chunks", "keep_nonfinite")
    return [p.name for p in kernel.params if p.name in integers and not p.do_not_specialize]


def main(names: list[str]) -> None:
    """Write {target: {variant: description}} to standard output."""
    result: dict[str, Any] = {}
    for name in names:
        is_hip = name.startswith("gfx")
        target = (
            GPUTarget("hip", name, 64) if is_hip else GPUTarget("cuda", int(name.removeprefix("sm_")), 32)
        )
        for variant in variants():
            assembly = compile_variant(target, variant).asm
            if is_hip:
                described = describe_amdgcn(assembly["amdgcn"])
            else:
                described = describe_ptx(target.arch, assembly["ptx"])
            described["specialized"] = specialized_integers(variant.kernel)
            result.setdefault(name, {})[variant.name] = described
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1:])
