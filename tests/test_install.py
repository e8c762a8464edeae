"""Installing from source: with a broken compiler, and where one is demanded."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("csrc", "fastclip", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")

pytestmark = pytest.mark.skipif(
    not (ROOT / "setup.py").is_file() or shutil.which("false") is None, reason="needs a source checkout"
)


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("FASTCLIP_", "PYTHONPATH"))} | environment
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=280, cwd=ROOT.anchor)


def install(tmp_path: Path, build_cpp: str) -> tuple[subprocess.CompletedProcess[str], Path]:
    """Install a copy of the sources where the compiler always fails."""
    pytest.importorskip("pybind11", reason="needs pybind11")
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    for name in SOURCES:
        origin = ROOT / name
        if origin.is_dir():
            shutil.copytree(origin, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(origin, source / name)
    options = ("--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check", "--verbose")
    done = run(
        *(sys.executable, "-m", "pip", "install", *options, "--target", str(target), str(source)),
        CC="false",
        CXX="false",
        FASTCLIP_BUILD_CPP=build_cpp,
    )
    return done, target


USE = """
import sys
# An editable install of these sources would answer for the extension that is missing here.
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
import torch, fastclip
assert fastclip.__file__.startswith({target!r}), fastclip.__file__
info = fastclip.backend_info()["cpu"]
parameter = torch.nn.Parameter(torch.zeros(2)); parameter.grad = torch.tensor([3.0, 4.0])
norm = fastclip.clip_grad_norm_([parameter], 1.0)
print(info.available, norm.item(), [round(x, 5) for x in parameter.grad.tolist()], info.reason, sep="|")
try:
    with fastclip.use_backend("cpu"): pass
except fastclip.BackendUnavailableError as error:
    print(error)
"""


def test_without_a_compiler_the_package_works_and_says_what_is_missing(tmp_path: Path) -> None:
    done, target = install(tmp_path, "auto")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "fastclip: the C++ CPU backend could not be built" in done.stdout + done.stderr
    assert not list((target / "fastclip").glob("_C*"))
    assert (target / "fastclip" / "py.typed").is_file()
    used = run(sys.executable, "-c", USE.format(target=str(target)), PYTHONPATH=str(target))
    assert used.returncode == 0, used.stderr
    first, _, second = used.stdout.partition("\n")
    assert first.startswith("False|5.0|[0.6, 0.8]|the C++ extension is not built or does not load")
    assert second.startswith("fastclip: backend 'cpu' cannot be used: the C++ extension is not built")


def test_a_compiler_that_is_required_must_be_there(tmp_path: Path) -> None:
    done, target = install(tmp_path, "require")
    assert done.returncode != 0
    assert not target.exists()


def test_off_does_not_try(tmp_path: Path) -> None:
    done, target = install(tmp_path, "off")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "could not be built" not in done.stdout + done.stderr
    assert (target / "fastclip" / "clip_grad.py").is_file()


def test_an_unknown_choice_is_refused(tmp_path: Path) -> None:
    done = run(sys.executable, str(ROOT / "setup.py"), "--version", FASTCLIP_BUILD_CPP="maybe")
    assert done.returncode != 0
    assert "FASTCLIP_BUILD_CPP='maybe'; expected auto, require or off." in done.stderr
