"""Build libfastclip_cuda<major>.so with nvcc. Needs neither torch nor Python's headers, nor a GPU.

setup.py calls it; `python csrc/cuda/build.py` builds into fastclip/ by itself.

Environment:
    FASTCLIP_CUDA_ARCHS: What to compile for, as TORCH_CUDA_ARCH_LIST says it: "8.0;9.0+PTX", or names such as
        "Ampere" and "Hopper". Without it TORCH_CUDA_ARCH_LIST decides, and without that the default is every
        architecture of `DEFAULT_ARCHS` that nvcc knows. The GPU of this machine decides nothing.
    CUDA_HOME, CUDA_PATH: The toolkit; otherwise that of the nvcc on PATH, otherwise /usr/local/cuda. Several,
        of different majors and separated as in PATH, give a library each.
    MAX_JOBS: Source files compiled at once; all by default.
    NVCC_THREADS: Architectures compiled at once for each file; as many as processors by default.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
DEFAULT_ARCHS = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0+PTX")
# TORCH_CUDA_ARCH_LIST's names; those of whole families come before their beginnings.
NAMED_ARCHS = {
    "Volta": "7.0+PTX",
    "Turing": "7.5+PTX",
    "Ampere+Tegra": "8.7",
    "Ampere": "8.0;8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell+Tegra": "11.0",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
}
# Kernel arguments may be larger than 4 KiB from here on.
MIN_CUDA = (12, 1)
MIN_ARCH = (7, 0)


class CudaBuildError(Exception):
    """Why the library cannot be built here."""


def find_nvcc() -> list[Path]:
    """Return the compilers of CUDA_HOME or CUDA_PATH, else that on PATH, else that of /usr/local/cuda."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if homes := os.environ.get(variable):
            found = [Path(home) / "bin" / "nvcc" for home in homes.split(os.pathsep)]
            for nvcc in found:
                if not nvcc.exists():
                    raise CudaBuildError(f"{variable} has no {nvcc}; expected a CUDA toolkit there.")
            return found
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    return [Path(nvcc)] if nvcc else []


def required_nvcc() -> list[Path]:
    """Return what `find_nvcc` finds, and object if that is nothing or cannot build what is asked for."""
    if sys.platform != "linux":
        raise CudaBuildError(f"the library is for Linux, and this is {sys.platform}.")
    found = find_nvcc()
    if not found:
        raise CudaBuildError("there is no nvcc; expected one in CUDA_HOME, on PATH or in /usr/local/cuda.")
    for nvcc in found:
        flags_for(nvcc)
    return found


def cuda_version(nvcc: Path) -> tuple[int, int]:
    """Return (major, minor) of a compiler."""
    output = _run([str(nvcc), "--version"])
    match = re.search(r"release (\d+)\.(\d+)", output)
    if match is None:
        raise CudaBuildError(f"{nvcc} --version names no release: {output!r}.")
    version = int(match[1]), int(match[2])
    if version < MIN_CUDA:
        minimum = ".".join(map(str, MIN_CUDA))
        raise CudaBuildError(f"{nvcc} is CUDA {version[0]}.{version[1]}; expected {minimum} or newer.")
    return version


def requested_archs() -> str | None:
    """Return FASTCLIP_CUDA_ARCHS, else TORCH_CUDA_ARCH_LIST, else None; an empty one counts as not set."""
    return os.environ.get("FASTCLIP_CUDA_ARCHS") or os.environ.get("TORCH_CUDA_ARCH_LIST") or None


def arch_flags(requested: str | None, supported: set[str]) -> list[str]:
    """Return nvcc's -gencode flags.

    Args:
        requested: A list in TORCH_CUDA_ARCH_LIST's grammar, or None for the default.
        supported: nvcc's codes, such as "sm_90".

    Raises:
        CudaBuildError: an entry is unknown or, where it was asked for, nothing this nvcc can build.
    """
    default = [a for a in DEFAULT_ARCHS if _code(a) in supported]
    archs = default if requested is None else _expanded(requested)
    flags = []
    for arch in archs:
        code = _code(arch)
        if code not in supported:
            known = ", ".join(sorted(supported, key=lambda c: (len(c), c)))
            raise CudaBuildError(f"this nvcc cannot build for {arch}; expected some of {known}.")
        compute = code.replace("sm_", "compute_")
        flags.append(f"-gencode=arch={compute},code={code}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch={compute},code={compute}")
    return list(dict.fromkeys(flags))


def _expanded(requested: str) -> list[str]:
    for name, archs in NAMED_ARCHS.items():
        requested = requested.replace(name, archs)
    archs = [a for a in re.split(r"[;\s]+", requested) if a]
    for arch in archs:
        match = re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", arch)
        if match is None:
            raise CudaBuildError(
                f"unknown architecture {arch!r}; expected for example 8.0;9.0+PTX or Hopper in "
                "FASTCLIP_CUDA_ARCHS (or TORCH_CUDA_ARCH_LIST)."
            )
        if (int(match[1]), int(match[2])) < MIN_ARCH:
            raise CudaBuildError(f"architecture {arch} is too old; expected 7.0 or newer.")
    if not archs:
        raise CudaBuildError("the list of architectures is empty; expected for example 8.0;9.0+PTX.")
    return archs


def _code(arch: str) -> str:
    return "sm_" + arch.removesuffix("+PTX").replace(".", "")


def flags_for(nvcc: Path) -> list[str]:
    """Return the flags for every source file."""
    supported = set(_run([str(nvcc), "--list-gpu-code"]).split())
    return [
        "-std=c++17",
        "-O3",
        "--expt-relaxed-constexpr",
        f"--threads={os.environ.get('NVCC_THREADS') or '0'}",
        "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra",
        *arch_flags(requested_archs(), supported),
    ]


def build(nvcc: Path, output_folder: Path, *, report: bool = False) -> tuple[Path, str]:
    """Compile and link.

    Args:
        nvcc: The compiler.
        output_folder: Where libfastclip_cuda<major>.so goes.
        report: Ask the assembler for registers, spills and stack frames.

    Returns:
        The library, and what the compiler said.

    Raises:
        CudaBuildError: nvcc is too old, an architecture is unknown, or the compilation failed.
    """
    major, _ = version = cuda_version(nvcc)
    flags = flags_for(nvcc)
    if report:
        flags.append("-Xptxas=-v")
    elif version >= (12, 4):
        # Older compilers know one way of compressing only, and use it by themselves.
        flags.append("--compress-mode=size")
    sources = [*sorted(HERE.glob("*.cu")), *sorted(HERE.glob("*.cpp"))]
    library = output_folder / f"libfastclip_cuda{major}.so"
    with tempfile.TemporaryDirectory() as scratch:
        objects = [Path(scratch) / f"{source.name}.o" for source in sources]

        def compile_one(source: Path, target: Path) -> str:
            return _run([str(nvcc), *flags, "-c", str(source), "-o", str(target)])

        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or len(sources))) as pool:
            said = "".join(pool.map(compile_one, sources, objects))
        # The runtime inside must neither be seen by others nor take their symbols: torch brings its own.
        linker = "-Xlinker=--exclude-libs=ALL,-Bsymbolic,--as-needed,--strip-all"
        output_folder.mkdir(parents=True, exist_ok=True)
        linked = [str(nvcc), "-shared", "-cudart=static", linker, *map(str, objects), "-o", str(library)]
        said += _run(linked)
    return library, said


def _run(command: list[str]) -> str:
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode != 0:
        raise CudaBuildError(f"this command failed:\n    {' '.join(command)}\n{done.stdout}")
    return done.stdout


if __name__ == "__main__":
    try:
        for found in required_nvcc():
            print(build(found, HERE.parents[1] / "fastclip")[0])
    except CudaBuildError as error:
        sys.exit(f"csrc/cuda/build.py: {error}")
