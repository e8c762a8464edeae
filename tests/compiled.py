"""What tests compile, kept under build/tests: for both processes of one run, and for the next run."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "build" / "tests"


def sources(folder: Path) -> list[Path]:
    """Return every file below a folder that a compiler may read."""
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix not in (".pyc", ".o", ".so"))


def kept(name: str, files: Iterable[Path], settings: Iterable[str], build: Callable[[Path], None]) -> Path:
    """Return a folder that `build` has filled from these files and settings.

    Args:
        name: Of what is built; one build of each name is kept.
        files: All that is read; other contents or paths mean another build.
        settings: What else decides the outcome: flags, versions of compilers.
        build: Fills the folder that it is given. While it runs, other processes wait.
            What it raises is raised here, and nothing is kept.
    """
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\0".encode())
    digest.update("\0".join(settings).encode())
    home = KEPT / name
    home.mkdir(parents=True, exist_ok=True)
    folder = home / digest.hexdigest()
    with (KEPT / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            for old in home.iterdir():
                shutil.rmtree(old)
            scratch = Path(tempfile.mkdtemp(dir=home))
            build(scratch)
            scratch.rename(folder)
    return folder
