"""Build `fastclip._C`, the C++ CPU backend, when a compiler is there, and libfastclip_cuda when nvcc is.

Everything else about the package is in pyproject.toml. Neither needs torch's headers or libraries: tensors
are read through the DLPack exchange API, so one build serves every torch >= 2.10.

Environment:
    FASTCLIP_BUILD_CPP: `auto` (default) builds the extension and carries on without it if that fails;
        `require` makes a failure an error; `off` does not try.
    FASTCLIP_BUILD_CUDA: the same for the CUDA library, which needs the extension. csrc/cuda/build.py lists
        the variables that steer its compilation.
    MAX_JOBS: Files compiled at once.
    FASTCLIP_WERROR: `1` turns compiler warnings into errors.
    FASTCLIP_SANITIZE: `1` adds AddressSanitizer and UndefinedBehaviorSanitizer.
"""

import importlib.util
import os
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext

# By path: a folder with a build.py on sys.path would hide the package of that name.
_spec = importlib.util.spec_from_file_location("cuda_build", Path(__file__).parent / "csrc/cuda/build.py")
cuda_build = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cuda_build)


def build_mode(variable: str) -> str:
    """Return auto, require or off, as an environment variable says."""
    mode = os.environ.get(variable, "auto").lower()
    if mode not in ("auto", "require", "off"):
        raise SystemExit(f"setup.py: {variable}={mode!r}; expected auto, require or off.")
    return mode


BUILD_CPP = build_mode("FASTCLIP_BUILD_CPP")
BUILD_CUDA = build_mode("FASTCLIP_BUILD_CUDA")
if BUILD_CUDA == "require" and BUILD_CPP == "off":
    raise SystemExit(
        "setup.py: FASTCLIP_BUILD_CUDA=require needs the extension; expected FASTCLIP_BUILD_CPP=require."
    )

NO_EXTENSION = """
********************************************************************************
fastclip: the C++ CPU backend could not be built:
    {error}
The installation goes on as pure Python: results stay right, but clipping runs
through torch's own operations and is not faster than torch.
Install a C++17 compiler and the Python headers, then install fastclip again.
FASTCLIP_BUILD_CPP=require turns this into an error, =off silences it.
********************************************************************************
"""

NO_CUDA_LIBRARY = """
********************************************************************************
fastclip: the CUDA library could not be built:
    {error}
The installation goes on without it: CUDA tensors take the Triton kernels where
triton is installed, otherwise torch's own operations.
FASTCLIP_BUILD_CUDA=require turns this into an error, =off silences it.
********************************************************************************
"""


class BuildExtension(build_ext):
    """`build_ext` that, unless told otherwise, survives the absence of a compiler, and of nvcc."""

    def run(self) -> None:
        """Build every extension and the CUDA library, or say loudly why there is none."""
        if BUILD_CUDA == "require":
            self.require_nvcc()
        try:
            super().run()
        except Exception as error:  # distutils and the compilers raise several unrelated types
            if "require" in (BUILD_CPP, BUILD_CUDA):
                raise
            print(NO_EXTENSION.format(error=error), file=sys.stderr, flush=True)
            self.extensions = []
        if self.extensions and BUILD_CUDA != "off" and sys.platform == "linux":
            self.build_cuda_library()

    def require_nvcc(self) -> None:
        """Fail before anything is compiled if the CUDA library cannot be built."""
        try:
            cuda_build.required_nvcc()
        except cuda_build.CudaBuildError as error:
            raise SystemExit(f"setup.py: FASTCLIP_BUILD_CUDA=require, but {error}") from error

    def build_cuda_library(self) -> None:
        """Put libfastclip_cuda beside the extension."""
        try:
            compilers = cuda_build.find_nvcc()
            if not compilers:
                print("fastclip: there is no nvcc, so the CUDA library is not built.", file=sys.stderr)
            for nvcc in compilers:
                library, _ = cuda_build.build(
                    nvcc, Path(self.get_ext_fullpath("fastclip._C")).resolve().parent
                )
                print(f"fastclip: built {library.name} with {nvcc}", file=sys.stderr)
        except cuda_build.CudaBuildError as error:
            if BUILD_CUDA == "require":
                raise SystemExit(f"setup.py: FASTCLIP_BUILD_CUDA=require, but {error}") from error
            print(NO_CUDA_LIBRARY.format(error=error), file=sys.stderr, flush=True)

    def copy_extensions_to_source(self) -> None:
        """Leave out of an editable install what was not built."""
        if self.extensions:
            super().copy_extensions_to_source()


def compile_flags() -> list[str]:
    """Return the flags shared by all translation units; instruction sets are chosen inside each unit."""
    if sys.platform == "win32":
        return ["/O2", "/std:c++17"]
    # No contraction by the compiler: where a fused multiply-add is exact the kernels ask for it, so every
    # instruction set gives the same bits.
    flags = ["-std=c++17", "-O3", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno"]
    # Nobody reads the floating-point exception flags, and keeping them right would rule vectors out.
    flags.append("-fno-trapping-math")
    if sys.platform == "linux":
        # Compiled with OpenMP but not linked to it: the symbols bind to the runtime that torch has loaded.
        flags.append("-fopenmp")
    if os.environ.get("FASTCLIP_WERROR") == "1":
        # GCC 12 warns of its own AVX-512 headers (gcc bug 105593).
        flags += ["-Wall", "-Wextra", "-Werror", "-Wno-maybe-uninitialized"]
    if os.environ.get("FASTCLIP_SANITIZE") == "1":
        flags += ["-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    return flags


def link_flags() -> list[str]:
    """Return the linker flags."""
    if os.environ.get("FASTCLIP_SANITIZE") == "1":
        return ["-fsanitize=address,undefined"]
    return []


def extensions() -> list:
    """Describe the extension modules of this build."""
    if BUILD_CPP == "off":
        return []
    from pybind11.setup_helpers import ParallelCompile, Pybind11Extension

    ParallelCompile("MAX_JOBS", default=0).install()
    csrc = Path("csrc")
    return [
        Pybind11Extension(
            "fastclip._C",
            sources=sorted(
                str(p) for folder in (csrc, csrc / "cpu", csrc / "python") for p in folder.glob("*.cpp")
            ),
            depends=sorted(str(p) for p in csrc.rglob("*.h")),
            include_dirs=[str(csrc)],
            extra_compile_args=compile_flags(),
            extra_link_args=link_flags(),
            cxx_std=17,
        )
    ]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExtension})
