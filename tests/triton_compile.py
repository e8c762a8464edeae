"""Compile every Triton kernel ahead of time for devices that need not be there; print what came out as JSON.

A program of its own: one process either compiles Triton's kernels or interprets them.

    python tests/triton_compile.py sm_90 gfx942

Up to LLVM IR, most of the work, an NVIDIA architecture is compiled for only once where it is seen to make no
difference: Triton's passes differ between them in matrix products and asynchronous copies.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.compiler.compiler import Language
from triton.runtime.cache import get_cache_key, get_cache_manager
from triton.runtime.jit import create_function_from_signature

from fastclip.kernels import (
    blocks,
    coefficients,
    elementwise,
    nonfinite,
    norm,
    scale,
    step,
    thresholds,
    units,
)

CHUNKS = {"chunks": "*i64", "num_chunks": "i32"}
NORM_TYPES = {"one": 1.0, "two": 2.0, "inf": math.inf, "any": 3.0}
WITNESSES = ("clamp", "total_norm_inf", "tensor_norms_two")
"""Whose LLVM IR tells whether that of all is the same for two architectures: loads and stores of each dtype,
conversions between them, the maximum and the sum of a block, an atomic, and reading what others wrote."""


class Variant(NamedTuple):
    """A kernel as its file launches it."""

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    layout: blocks.Blocks


def variants() -> list[Variant]:
    """Every kernel, the norms once for each kind."""
    found = []
    by = {"value": "fp64", "value_on_device": "*fp64"}
    for name, kernel, arguments, constants in (
        ("scale", scale.scale_kernel, {"coefficients": "*fp64"}, {"PER_TENSOR": False}),
        ("scale_each", scale.scale_kernel, {"coefficients": "*fp64"}, {"PER_TENSOR": True}),
        ("clamp", elementwise.elementwise_kernel, by, {"OPERATION": "clamp"}),
        ("nonfinite", nonfinite.count_nonfinite_kernel, {"counts": "*i64"}, {}),
    ):
        layout = blocks.ELEMENTWISE
        constants = {**constants, "ROWS": layout.rows}
        found.append(Variant(name, kernel, {**CHUNKS, **arguments}, constants, layout))
    for name, scale_type in (("clip_units", "constexpr"), ("clip_units_scaled", "*fp32")):
        signature = {"runs": "*i64", "num_runs": "i32", "ratio": "fp64", "eps": "fp64"}
        signature["grad_scale"] = scale_type
        constants = {**absent(signature), "ROWS": units.OF_UNITS.rows}
        found.append(Variant(name, units.clip_units_kernel, signature, constants, units.OF_UNITS))
    for returned, on_device in (("fp32", "constexpr"), ("fp64", "*fp64")):
        signature = {"norm": f"*{returned}", "coefficient_out": "*fp64", "max_norm": "fp64"}
        signature["max_norm_on_device"] = on_device
        constants = absent(signature)
        layout = norm.OF_LIST
        found.append(
            Variant(f"coefficient_{returned}", norm.coefficient_kernel, signature, constants, layout)
        )
    for name, norm_type in NORM_TYPES.items():
        kind = norm.kind_of(norm_type)
        layout = norm.blocks_of(kind)
        signature = {
            **CHUNKS,
            **{"ticket": "*i64", "partials": "*fp64", "norm_out": "*fp32", "coefficient_out": "*fp64"},
            **{"p": "fp64", "max_norm": "fp64", "max_norm_on_device": "constexpr", "keep_nonfinite": "i32"},
        }
        constants = {"KIND": kind, "ROWS": layout.rows, "PARTIALS": norm.PARTIALS_OF_LIST}
        # What a threshold on the device adds, behind the norm, does not depend on the kind.
        on_device = {"_on_device": "*fp64"} if name == "two" else {}
        for suffix, threshold in {"": "constexpr", **on_device}.items():
            own = {**signature, "max_norm_on_device": threshold}
            variant = f"total_norm_{name}{suffix}"
            found.append(Variant(variant, norm.total_norm_kernel, own, {**constants, **absent(own)}, layout))

        layout = norm.blocks_of(kind)
        signature = {**CHUNKS, "partials": "*fp64", "p": "fp64"}
        constants = {"KIND": kind, "ROWS": layout.rows}
        found.append(Variant(f"chunk_norms_{name}", norm.chunk_norms_kernel, signature, constants, layout))

        signature = {"partials": "*fp64", "first_chunks": "*i64", "norms_out": "*fp32", "p": "fp64"}
        constants = {"KIND": kind, "PARTIALS": norm.PARTIALS_OF_TENSOR}
        layout = norm.OF_TENSOR
        found.append(Variant(f"tensor_norms_{name}", norm.tensor_norms_kernel, signature, constants, layout))
    return [*found, *step_variants(), *threshold_variants()]


def absent(signature: dict[str, str]) -> dict[str, int | None]:
    """Return the pointers that this variant does without."""
    return {name: None for name, kind in signature.items() if kind == "constexpr"}


def step_variants() -> Iterator[Variant]:
    """The kernels of an optimizer's step, beside the norm, with what is optional and without it."""
    counts_on = {"counts": "*fp64", "targets": "*i64", "num_tensors": "i32", "rules": "*fp64"}
    for kind, (decide, update, layout) in step.KERNELS.items():
        for name, amp, returned, limit, given in (
            ("plain", "constexpr", "fp32", "constexpr", "constexpr"),
            ("scaled", "*fp32", "fp64", "*fp64", "constexpr"),
            ("given", "constexpr", "fp32", "constexpr", "*fp64"),
        ):
            signature = {
                **{"norm": "constexpr" if given == "*fp64" else "*fp64", "given": given},
                **{"grad_scale": amp, "found_inf": amp},
                **{"max_norm": "fp64", "max_norm_on_device": limit, "skip_nonfinite": "i32"},
                **{"norm_out": f"*{returned}", "coefficient_out": f"*{returned}", "skipped_out": "*u8"},
                **{**counts_on, "coefficients": "*fp64"},
            }
            constants = {"TENSORS": coefficients.TENSORS_PER_PROGRAM, "PER_TENSOR": name == "given"}
            constants |= absent(signature)
            yield Variant(f"{kind}_decide_{name}", decide, signature, constants, coefficients.OF_TENSORS)
        signature = {
            **CHUNKS,
            "targets": "*i64",
            "coefficients": "*fp64",
            "skipped": "*u8",
            "max_value": "fp64",
        }
        for name, write_grads in (("step", False), ("step_and_write", True)):
            constants = {"WRITE_GRADS": write_grads, "ROWS": layout.rows}
            yield Variant(f"{kind}_{name}", update, signature, constants, layout)


def threshold_variants() -> Iterator[Variant]:
    """The kernels by which strategies learn: the one that sorts twice with the largest window."""
    layout = thresholds.OF_STATE
    block = {"BLOCK": thresholds.LARGEST_WINDOW}
    norms = {"norm": "*fp32", "skipped": "*u8"}
    window = {**norms, "window": "*fp64", "threshold": "*fp64", "length": "i32", "warmup": "i32"}
    signature = {**window, "k": "fp64", "factor": "fp64"}
    yield Variant("median_mad", thresholds.median_mad_kernel, signature, block, layout)
    signature = {**window, "share": "fp64"}
    block = {"BLOCK": 128}  # to sort more is slow to compile, and done above
    yield Variant("percentile", thresholds.percentile_kernel, signature, block, layout)
    history = {**norms, **dict.fromkeys(("history", "longer", "size", "threshold"), "*fp64")}
    signature = {**history, "length": "i32", "warmup": "i32", "share": "fp64"}
    block = {"BLOCK": thresholds.HISTORY_PER_PROGRAM}
    yield Variant("percentile_of_all", thresholds.percentile_of_all_kernel, signature, block, layout)
    # All three read the norm by one function, so the one that is compiled soonest shows its other form.
    for returned, skipped in (("fp32", "*u8"), ("fp64", "constexpr")):
        signature = {"norm": f"*{returned}", "skipped": skipped, "threshold": "*fp64"}
        signature |= {"quantile": "fp64", "eta": "fp64"}
        kernel = thresholds.quantile_servo_kernel
        yield Variant(f"quantile_servo_{returned}", kernel, signature, absent(signature), layout)
    signature = {"norm": "*fp64", "threshold": "*fp64", "limit": "*fp64", "coefficient": "*fp64"}
    signature |= {"outlier": "*u8", "factor": "fp64"}
    yield Variant("skip", thresholds.skip_kernel, signature, {}, layout)
    signature = {"norm": "*fp64", "first": "*fp64", "moments": "*fp64", "threshold": "*fp64"}
    signature |= {"coefficient": "*fp64", "warmup": "i32", "decay": "fp64", "z_threshold": "fp64"}
    signature["factor"] = "fp64"
    yield Variant("zscore", thresholds.zscore_kernel, signature, {"BLOCK": 32}, layout)
    vectors = ("norms", "total_norm", "average", "seen", "coefficients", "limits")
    signature = {**dict.fromkeys(vectors, "*fp64"), "count": "i32", "ratio": "fp64", "decay": "fp64"}
    signature |= {"warmup": "i32", "warmup_max_norm": "fp64"}
    block = {"BLOCK": thresholds.NORMS_PER_PROGRAM}
    yield Variant("ema", thresholds.ema_kernel, signature, block, layout)
    vectors = ("norms", "total_norm", "mean", "square", "seen", "coefficients")
    signature = {**dict.fromkeys(vectors, "*fp64"), "count": "i32"}
    signature |= dict.fromkeys(("beta1", "beta2", "eps", "limit"), "fp64")
    yield Variant("norm_stabilised", thresholds.norm_stabilised_kernel, signature, block, layout)


def source_of(variant: Variant) -> ASTSource:
    """Return what a launch compiles: torch's allocator aligns pointers, and no integer is specialized."""
    pointers = [i for i, kind in enumerate(variant.signature.values()) if kind.startswith("*")]
    return ASTSource(
        variant.kernel,
        signature={**variant.signature, **dict.fromkeys(variant.constants, "constexpr")},
        constexprs=variant.constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in pointers},
    )


def compile_variant(target: GPUTarget, variant: Variant) -> Any:
    """Return each stage's outcome, from source to machine code."""
    options = variant.layout.options(is_hip=target.backend == "hip")
    return triton.compile(source_of(variant), target=target, options=options).asm


def finish_variant(target: GPUTarget, variant: Variant, llvm_ir: str) -> dict[str, Any]:
    """Compile LLVM IR for an NVIDIA architecture by the last stages of `triton.compile`, kept as by that."""
    backend = make_backend(target)
    options = backend.parse_options(variant.layout.options(is_hip=False))
    key = get_cache_key(source_of(variant), backend, options, {"LLVM IR": llvm_ir})
    kept = get_cache_manager(hashlib.sha256(key.encode()).hexdigest())
    stages: dict[str, Any] = {}
    backend.add_stages(stages, options, Language.TRITON)
    ptx, cubin = kept.get_file("kernel.ptx"), kept.get_file("kernel.cubin")
    if ptx is None or cubin is None:
        text = stages["ptx"](llvm_ir, {})
        ptx, cubin = kept.put(text, "kernel.ptx"), kept.put(stages["cubin"](text, {}), "kernel.cubin")
    return {"ptx": Path(ptx).read_text(), "cubin": Path(cubin).read_bytes()}


def compile_all(targets: list[GPUTarget]) -> Iterator[tuple[GPUTarget, Variant, Any]]:
    """Yield (target, variant, PTX and cubin or AMD's assembly)."""
    every = variants()
    first: dict[str, str] = {}
    for target in targets:
        is_nvidia = target.backend == "cuda"
        compiled = {v.name: compile_variant(target, v) for v in every if v.name in WITNESSES}
        is_same = bool(is_nvidia and first) and all(
            compiled[name]["llir"] == first[name] for name in WITNESSES
        )
        for variant in every:
            if variant.name in compiled:
                made = compiled[variant.name]
            elif is_same:
                made = finish_variant(target, variant, first[variant.name])
            else:
                made = compile_variant(target, variant)
            if is_nvidia and not is_same:
                first[variant.name] = made["llir"]
            yield target, variant, made


def describe_nvidia(ptx: str, cubin: bytes) -> dict[str, Any]:
    """Count accesses in PTX, and take registers and local memory from the machine code itself."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", report)}
    return {
        "accesses": Counter(re.findall(r"\b(?:ld|st)\.global(?:\.\w+)*", ptx)),
        "atomics": Counter(re.findall(r"\batom(?:\.\w+)*", ptx)),
        "spilled_nbytes": usage["STACK"] + usage["LOCAL"],
        "registers": usage["REG"],
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


def is_compiled_again(variant: Variant) -> bool:
    """Whether a launch with other numbers looks for other code, as Triton decides when it launches."""
    backend = make_backend(GPUTarget("cuda", 90, 32))
    bind = create_function_from_signature(variant.kernel.signature, variant.kernel.params, backend)
    values = {"i32": (1, 16, 17, 2**20), "fp64": (1.0, 2.5, math.inf, 16.0)}
    seen = set()
    for i in range(4):
        arguments = {
            name: torch.empty(16) if kind.startswith("*") else values[kind][i]
            for name, kind in variant.signature.items()
            if kind != "constexpr"
        }
        specialization = bind(**arguments, **variant.constants)[1]
        seen.add(str(specialization))
        kinds = [kind for kind, _ in specialization][: len(variant.signature)]
        expected = ["*fp32" if kind.startswith("*") else kind for kind in variant.signature.values()]
        assert kinds == expected, f"{variant.name}: launched with {kinds}, compiled for {expected}"
    return len(seen) > 1


def main(names: list[str]) -> None:
    """Write {target: {variant: description}} to standard output."""
    targets = {
        GPUTarget("hip", name, 64)
        if name.startswith("gfx")
        else GPUTarget("cuda", int(name.removeprefix("sm_")), 32): name
        for name in names
    }
    result: dict[str, Any] = {name: {} for name in names}
    for target, variant, made in compile_all(list(targets)):
        is_hip = target.backend == "hip"
        described = describe_amdgcn(made["amdgcn"]) if is_hip else describe_nvidia(made["ptx"], made["cubin"])
        # Registers are handed out in eights; a multiprocessor has 65536, a compute unit twice as many.
        registers = -(-described["registers"] // 8) * 8 * variant.layout.threads
        described["programs"] = (131072 if is_hip else 65536) // registers
        described["programs_of_launch"] = variant.layout.programs_per_unit
        described["compiled_again"] = is_compiled_again(variant)
        result[targets[target]][variant.name] = described
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1:])
