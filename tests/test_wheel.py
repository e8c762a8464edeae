"""The distributions: sdist, the wheel built from it, and what an installation of that wheel can do."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import torch
from compiled import kept, sources

ROOT = Path(__file__).parents[1]
HAS_NVCC = shutil.which("nvcc") is not None or bool(os.environ.get("CUDA_HOME"))

pytestmark = [
    pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree"),
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("build", "pybind11")),
        reason="needs build and pybind11",
    ),
]

CLIP = """
import math, sys, torch, fastclip
assert fastclip.__file__.startswith(sys.prefix), fastclip.__file__
parameter = torch.nn.Parameter(torch.zeros(2))
parameter.grad = torch.tensor([3e30, 4e30])
norm = fastclip.clip_grad_norm_([parameter], 1.0)
assert math.isclose(norm.item(), 5e30, rel_tol=1e-6), norm
assert torch.allclose(parameter.grad, torch.tensor([0.6, 0.8])), parameter.grad
print(" ".join(name for name, backend in fastclip.backend_info().items() if backend.available))
print(fastclip.backend_info()["cuda"].reason)
"""


def _build(source: Path, output: Path, kind: str, **environment: str) -> Path:
    # Without isolation, which needs a package index; `make wheel` isolates.
    command = [sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "--outdir", output, source]
    done = subprocess.run(command, env={**os.environ, **environment}, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return max(output.iterdir(), key=lambda path: path.stat().st_mtime_ns)


def _install(wheel: Path, folder: Path) -> str:
    """Install into an environment that holds nothing but what the wheel depends on; return its Python."""
    venv.create(folder, with_pip=False)
    python = str(folder / "bin/python")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--python", python]
    # From there: in the source tree, pip takes the tree itself for an installation.
    install = [*pip, "install", "--no-deps", "--no-index", "--ignore-installed", str(wheel)]
    subprocess.run(install, cwd=folder, env=_clean_environment(), check=True)
    [site_packages] = folder.glob("lib/python*/site-packages")
    (site_packages / "dependencies.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    return python


def _clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "FASTCLIP"))}


def _run(python: str, script: str, folder: Path) -> list[str]:
    environment = _clean_environment()
    return subprocess.check_output(
        [python, "-c", script], cwd=folder, env=environment, text=True
    ).splitlines()


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _build(ROOT, tmp_path_factory.mktemp("sdist"), "sdist")


@pytest.fixture(scope="module")
def unpacked(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return folder / sdist.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist, with everything that this machine can build.

    How fast the code is does not matter here, so the compilers need not think: `make test` has built the same
    extension with every optimization, and test_cuda_build.py the same library. What they made is kept, for
    setuptools to find, until something changes that decides what is compiled, and from which files.
    """
    cuda = "require" if HAS_NVCC else "off"
    environment = {"FASTCLIP_BUILD_CPP": "require", "FASTCLIP_BUILD_CUDA": cuda, "FASTCLIP_CUDA_ARCHS": "8.0"}
    if compiler := shutil.which("g++"):
        # Behind the flags of setup.py, where the last one counts.
        hasty = tmp_path_factory.mktemp("compiler") / "g++"
        hasty.write_text(f'#!/bin/sh\nexec {shlex.quote(compiler)} "$@" -O0 -g0\n', encoding="utf-8")
        hasty.chmod(0o755)
        environment |= {"CC": str(hasty), "CXX": str(hasty)}
    nvcc = shutil.which("nvcc")
    if nvcc and "--Ofast-compile" in subprocess.check_output([nvcc, "--help"], text=True):
        environment["NVCC_APPEND_FLAGS"] = "--Ofast-compile=max"

    def compile_all(folder: Path) -> None:
        _build(unpacked, tmp_path_factory.mktemp("compiled"), "wheel", **environment)
        shutil.copytree(unpacked / "build", folder / "build")

    files = [ROOT / name for name in ("setup.py", "pyproject.toml", "MANIFEST.in")]
    settings = [sys.version, metadata.version("setuptools"), metadata.version("pybind11"), cuda]
    settings += [subprocess.check_output([c, "--version"], text=True) for c in (compiler, nvcc) if c]
    made = kept("wheel", [*sources(ROOT / "csrc"), *files], settings, compile_all)
    # As new as now, which is newer than the sources.
    shutil.copytree(made, unpacked, dirs_exist_ok=True, copy_function=shutil.copy)
    return _build(unpacked, tmp_path_factory.mktemp("wheel"), "wheel", **environment)


def test_the_sdist_holds_all_sources(unpacked: Path) -> None:
    def tracked(*patterns: str) -> set[str]:
        return {str(p.relative_to(ROOT)) for pattern in patterns for p in ROOT.glob(pattern) if p.is_file()}

    sources = tracked("csrc/**/*.h", "csrc/**/*.cpp", "csrc/**/*.cu*", "csrc/**/*.py", "fastclip/**/*.py")
    others = tracked("tests/*.py", "tests/cuda_emulation/*", "LICENSE", "Makefile", "constraints.txt")
    missing = {path for path in sources | others if not (unpacked / path).is_file()}
    assert len(sources) > 20
    assert not missing


def test_the_wheel_holds_the_extension_and_the_cuda_library_as_asked(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    libraries = [name for name in names if name.endswith(".so")]
    assert sum(name.startswith("fastclip/_C.") for name in libraries) == 1
    assert any(re.fullmatch(r"fastclip/libfastclip_cuda\d+\.so", name) for name in libraries) == HAS_NVCC
    assert {name.split("/")[0].split("-")[0] for name in names} == {"fastclip"}
    assert "fastclip/py.typed" in names
    assert not [name for name in names if name.endswith((".cu", ".cuh", ".cpp", ".h"))]


def test_an_installed_wheel_clips(wheel: Path, tmp_path: Path) -> None:
    backends, reason = _run(_install(wheel, tmp_path / "environment"), CLIP, tmp_path)
    assert {"cpu", "eager"} <= set(backends.split())
    assert reason


def test_auditwheel_finds_nothing_that_other_systems_lack(wheel: Path) -> None:
    if sys.platform != "linux" or importlib.util.find_spec("auditwheel") is None:
        pytest.skip("needs auditwheel")
    report = subprocess.check_output([sys.executable, "-m", "auditwheel", "show", str(wheel)], text=True)
    assert re.search(r'following platform tag:\s+"manylinux_2_\d+_\w+"', report), report
    # None of torch's or CUDA's libraries is linked, so that nothing needs to be grafted in.
    linked = {name for name in re.findall(r"\blib\w+\.so", report) if not name.startswith("libfastclip")}
    assert linked <= {
        "libc.so",
        "libm.so",
        "libstdc.so",
        "libgcc_s.so",
        "libdl.so",
        "librt.so",
        "libpthread.so",
    }


def test_a_wheel_without_native_code_is_pure_and_clips(unpacked: Path, tmp_path: Path) -> None:
    environment = {"FASTCLIP_BUILD_CPP": "off", "FASTCLIP_BUILD_CUDA": "off"}
    wheel = _build(unpacked, tmp_path / "wheel", "wheel", **environment)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    backends, reason = _run(_install(wheel, tmp_path / "environment"), CLIP, tmp_path)
    assert "eager" in backends.split()
    assert "cpu" not in backends.split()
    assert "not built" in reason
