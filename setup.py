"""Build `fastclip._C`, the C++ CPU backend, when a compiler is there.

Everything else about the package is in pyproject.toml. The extension needs neither torch's headers nor
its libraries: it reads tensors through the DLPack exchange API, so one build serves every torch >= 2.10.

Environment:
    FASTCLIP_BUILD_CPP: `auto` (default) builds the extension and carries on without it if that fails;
        `require` makes a failure an error; `off` does not try.
    FASTCLIP_WERROR: `1` turns compiler warnings into errors.
    FASTCLIP_SANITIZE: `1` adds AddressSanitizer and UndefinedBehaviorSanitizer.
"""

import os
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext

BUILD_CPP = os.environ.get("FASTCLIP_BUILD_CPP", "auto").lower()
if BUILD_CPP not in ("auto", "require", "off"):
    raise SystemExit(f"setup.py: FASTCLIP_BUILD_CPP={BUILD_CPP!r}; expected auto, require or off.")

NO_EXTENSION = """
********************************************************************************
fastclip: the C++ CPU backend could not be built:
    {error}
The installation goes on as pure Python: results stay right, but clipping on CPU
runs through torch's own operations and is not faster than torch.
Install a C++17 compiler and the Python headers, then install fastclip again.
FASTCLIP_BUILD_CPP=require turns this into an error, =off silences it.
********************************************************************************
"""


class BuildExtension(build_ext):
    """`build_ext` that, unless told otherwise, survives the absence of a compiler."""

    def run(self) -> None:
        """Build every extension, or say loudly why there is none."""
        try:
            super().run()
        except Exception as error:  # distutils and the compilers raise several unrelated types
            if BUILD_CPP == "require":
                raise
            print(NO_EXTENSION.format(error=error), file=sys.stderr, flush=True)
            self.extensions = []

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

    ParallelCompile("FASTCLIP_BUILD_JOBS", default=0).install()
    csrc = Path("csrc")
    return [
        Pybind11Extension(
            "fastclip._C",
            sources=sorted(str(p) for folder in (csrc, csrc / "cpu") for p in folder.glob("*.cpp")),
            depends=sorted(str(p) for p in csrc.rglob("*.h")),
            include_dirs=[str(csrc)],
            extra_compile_args=compile_flags(),
            extra_link_args=link_flags(),
            cxx_std=17,
        )
    ]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExtension})
