"""The CUDA library compiled by nvcc: what assembler and linker made of it, and loading it without a GPU."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import compiled
import pytest
import torch
from programs import run_python

ROOT = Path(__file__).parents[1]
# Of every generation the one that trains. Two are assembled from the PTX of the one before, the same but for
# its name as long as no source asks for the architecture: to write PTX takes longer than to assemble it.
ARCHS = ("sm_80", "sm_90", "sm_100", "sm_120")
ARCH_FLAGS = ["-gencode=arch=compute_80,code=[sm_80,sm_90]", "-gencode=arch=compute_100,code=[sm_100,sm_120]"]
VECTORIZED_NORMS = ("SumSquares", "SumMagnitudes", "MaxMagnitude")
NUM_DTYPES, LOADS_IN_FLIGHT = 4, 4


def _load_build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cuda_build", ROOT / "csrc/cuda/build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


cuda_build = _load_build()
SUPPORTED = {"sm_75", "sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "sm_121"}
needs_nvcc = pytest.mark.skipif(not cuda_build.find_nvcc(), reason="needs nvcc")


@pytest.fixture(scope="module")
def built() -> tuple[Path, str]:
    """The library for all architectures, and the assembler's report."""
    nvcc = cuda_build.find_nvcc()[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_build, "arch_flags", lambda requested, supported: ARCH_FLAGS)

        def build(folder: Path) -> None:
            _, report = cuda_build.build(nvcc, folder, report=True)
            (folder / "report").write_text(report)

        version = subprocess.check_output([nvcc, "--version"], text=True)
        settings = [str(nvcc), version, *cuda_build.flags_for(nvcc)]
        folder = compiled.kept("nvcc", compiled.sources(ROOT / "csrc"), settings, build)
    [library] = folder.glob("*.so")
    return library, (folder / "report").read_text()


@pytest.mark.parametrize(
    ("requested", "expected"),
    [
        ("9.0", ["compute_90,code=sm_90"]),
        ("8.0;9.0+PTX", ["compute_80,code=sm_80", "compute_90,code=sm_90", "compute_90,code=compute_90"]),
        ("8.0 8.6", ["compute_80,code=sm_80", "compute_86,code=sm_86"]),
        ("Ampere", ["compute_80,code=sm_80", "compute_86,code=sm_86", "compute_86,code=compute_86"]),
        ("Ampere+Tegra", ["compute_87,code=sm_87"]),
        ("Hopper;9.0", ["compute_90,code=sm_90", "compute_90,code=compute_90"]),
        ("12.1", ["compute_121,code=sm_121"]),
    ],
)
def test_architectures_follow_torchs_grammar(requested: str, expected: list[str]) -> None:
    assert cuda_build.arch_flags(requested, SUPPORTED) == [f"-gencode=arch={e}" for e in expected]


def test_default_architectures_are_those_that_nvcc_knows() -> None:
    flags = cuda_build.arch_flags(None, {"sm_80", "sm_90"})
    assert flags == ["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90,code=sm_90"]


@pytest.mark.parametrize(
    ("requested", "message"),
    [
        ("sm_90", "unknown architecture 'sm_90'; expected for example"),
        ("native", "unknown architecture 'native'"),
        ("6.1", r"6\.1 is too old; expected 7\.0"),
        ("13.0", r"cannot build for 13\.0; expected some of sm_75, "),
        (" ; ", "list of architectures is empty"),
    ],
)
def test_wrong_architectures_are_named(requested: str, message: str) -> None:
    with pytest.raises(cuda_build.CudaBuildError, match=message):
        cuda_build.arch_flags(requested, SUPPORTED)


def test_fastclips_own_list_comes_before_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTCLIP_CUDA_ARCHS", raising=False)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    assert cuda_build.requested_archs() is None
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    assert cuda_build.requested_archs() == "8.0"
    monkeypatch.setenv("FASTCLIP_CUDA_ARCHS", "9.0")
    assert cuda_build.requested_archs() == "9.0"


def test_a_toolkit_without_a_compiler_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(cuda_build.CudaBuildError, match=r"CUDA_HOME has no .*/bin/nvcc"):
        cuda_build.find_nvcc()


def test_several_toolkits_give_several_compilers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    homes = [tmp_path / "cuda-12.8", tmp_path / "cuda-13.0"]
    for home in homes:
        (home / "bin").mkdir(parents=True)
        (home / "bin/nvcc").touch()
    monkeypatch.setenv("CUDA_HOME", os.pathsep.join(map(str, homes)))
    assert cuda_build.find_nvcc() == [home / "bin/nvcc" for home in homes]


def test_an_old_toolkit_is_named(tmp_path: Path) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho Cuda compilation tools, release 11.8, V11.8.89\n")
    nvcc.chmod(0o755)
    with pytest.raises(cuda_build.CudaBuildError, match=r"is CUDA 11\.8; expected 12\.1 or newer"):
        cuda_build.build(nvcc, tmp_path)


def test_requiring_cuda_without_nvcc_fails_before_anything_is_compiled(tmp_path: Path) -> None:
    environment = {**os.environ, "FASTCLIP_BUILD_CUDA": "require", "CUDA_HOME": str(tmp_path)}
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True)
    assert done.returncode != 0
    assert "FASTCLIP_BUILD_CUDA=require, but CUDA_HOME has no" in done.stderr
    assert not list(tmp_path.iterdir())


def test_no_source_asks_for_the_architecture() -> None:
    """Which is why one PTX stands for two of them here."""
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cu", ".cuh", ".cpp", ".h")]
    asking = [path.name for path in sources if re.search(r"__CUDA_ARCH|NV_IF_TARGET", path.read_text())]
    assert len(sources) > 20
    assert asking == []


@needs_nvcc
def test_no_kernel_spills_or_uses_local_memory(built: tuple[Path, str]) -> None:
    report = built[1]
    assert "warning" not in report
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    kernels = re.findall(r"Compiling entry function '(\w+)' for '(sm_\d+)'", report)
    assert {arch for _, arch in kernels} == set(ARCHS)
    assert len(frames) >= len(kernels) > 100
    assert set(frames) == {("0", "0", "0")}


@needs_nvcc
def test_the_grid_fits_the_registers(built: tuple[Path, str]) -> None:
    """Four blocks of 256 threads share the 65,536 registers of a multiprocessor; of update_spans, two."""
    reported = re.findall(r"Compiling entry function '(\w+)'.*?Used (\d+) registers", built[1], re.DOTALL)
    updates = [int(registers) for name, registers in reported if "update_spans" in name]
    others = [int(registers) for name, registers in reported if "update_spans" not in name]
    assert updates
    assert max(updates) <= 128
    assert max(others) <= 64


@needs_nvcc
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_every_dtype_has_four_16_byte_loads_in_flight(built: tuple[Path, str], arch: str) -> None:
    """Reads the machine code: no arithmetic on loaded values may come between the four loads of a step."""
    for name, code in _machine_code(built[0], arch).items():
        if "accumulate" not in name or not any(kind in name for kind in VECTORIZED_NORMS):
            continue
        steps = 0
        for start in (i for i, line in enumerate(code) if "LDG.E.128" in line and "@" in line):
            window = code[start : start + 24]
            arithmetic = next(
                (i for i, line in enumerate(window) if re.search(r"\b[FD](FMA|MUL|ADD)\b", line)), 24
            )
            steps += sum("LDG.E.128" in line for line in window[:arithmetic]) == LOADS_IN_FLIGHT
        assert steps >= NUM_DTYPES, f"{name} has {steps} dtypes with four loads in flight"


@needs_nvcc
@pytest.mark.parametrize("arch", ARCHS)
def test_writing_kernels_store_16_bytes(built: tuple[Path, str], arch: str) -> None:
    for name, code in _machine_code(built[0], arch).items():
        if any(kernel in name for kernel in ("scale_spans", "update_elements", "update_spans")):
            stores = sum("ST.E.128" in line or "STG.E.128" in line for line in code)
            loads = sum("LD.E.128" in line or "LDG.E.128" in line for line in code)
            assert stores >= 2 * NUM_DTYPES, name
            assert loads >= 2 * NUM_DTYPES, name


@needs_nvcc
@pytest.mark.parametrize("arch", ARCHS)
def test_a_step_loads_all_it_updates_before_it_computes(built: tuple[Path, str], arch: str) -> None:
    """Adam reads four tensors at once, and SGD with momentum three, 16 bytes of each."""
    for name, code in _machine_code(built[0], arch).items():
        if "update_spans" not in name:
            continue
        tensors = 4 if "Adam" in name else 3
        together = loads = 0
        for line in code:
            if re.search(r"\bLDG?\.E\.128", line):
                loads += 1
            elif re.search(r"\b[FD](FMA|MUL|ADD)\b|\bBRA\b", line):
                together += loads >= tensors
                loads = 0
        assert together >= NUM_DTYPES, f"{name} has {together} loops with {tensors} loads in flight"


@needs_nvcc
def test_the_library_needs_the_c_and_cpp_runtimes_only(built: tuple[Path, str]) -> None:
    if shutil.which("readelf") is None:
        pytest.skip("needs readelf")
    dynamic = subprocess.check_output(["readelf", "-d", built[0]], text=True)
    needed = set(re.findall(r"NEEDED.*\[(.+)\]", dynamic))
    allowed = r"(libc|libm|libdl|librt|libpthread|libstdc\+\+|libgcc_s|ld-linux-[\w-]+)\.so\.\d"
    assert needed
    assert all(re.fullmatch(allowed, name) for name in needed), needed
    symbols = subprocess.check_output(["readelf", "--dyn-syms", "--wide", built[0]], text=True)
    exported = {
        line.split()[-1] for line in symbols.splitlines() if " GLOBAL " in line and " UND " not in line
    }
    assert exported
    assert all(name.startswith("fastclip_cuda_") for name in exported), exported


@needs_nvcc
def test_without_a_driver_the_library_loads_and_says_why_not(built: tuple[Path, str]) -> None:
    """In a process of its own: the extension keeps the library that it loads first."""
    script = (
        "import torch; from fastclip import _C; import sys;"
        "print(repr(_C.load_cuda_library(sys.argv[1])), _C.probe_cuda(0))"
    )
    if importlib.util.find_spec("fastclip._C") is None:
        pytest.skip("needs the C++ extension")
    output = run_python(script, str(built[0])).stdout
    if torch.cuda.device_count():
        pytest.skip("needs a machine without a CUDA device")
    assert re.match(r"'' (CUDA driver version is insufficient|no CUDA-capable device)", output), output


@functools.cache
def _machine_code(library: Path, arch: str) -> dict[str, list[str]]:
    """Return each kernel's instructions."""
    cuobjdump = _cuobjdump()
    if cuobjdump is None:
        pytest.skip("needs cuobjdump, which the CUDA toolkit and the triton package bring")
    listing = subprocess.check_output([cuobjdump, "-sass", "-arch", arch, library], text=True)
    code: dict[str, list[str]] = {}
    for line in listing.splitlines():
        if match := re.search(r"Function : (\w+)", line):
            code[match[1]] = current = []
        elif match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            current.append(match[1])
    assert code
    return code


def _cuobjdump() -> str | None:
    spec = importlib.util.find_spec("triton")
    bundled = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump" if spec and spec.origin else None
    return shutil.which("cuobjdump") or (str(bundled) if bundled and bundled.exists() else None)
