"""What is compiled once and kept."""

from __future__ import annotations

from pathlib import Path

import compiled
import pytest


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(compiled, "KEPT", tmp_path / "kept")
    path = tmp_path / "source.cpp"
    path.write_text("int one;")
    return path


def test_the_same_sources_are_built_once_and_others_anew(source: Path) -> None:
    built: list[Path] = []

    def build(folder: Path) -> None:
        (folder / "product").write_text(source.read_text())
        built.append(folder)

    def product(*settings: str) -> str:
        return (compiled.kept("library", [source], settings, build) / "product").read_text()

    assert [product("-O2"), product("-O2"), len(built)] == ["int one;", "int one;", 1]
    source.write_text("int two;")
    assert [product("-O2"), product("-O2"), len(built)] == ["int two;", "int two;", 2]
    assert [product("-O3"), product("-O3"), len(built)] == ["int two;", "int two;", 3]
    assert len(list((compiled.KEPT / "library").iterdir())) == 1


def test_a_build_that_fails_is_not_kept(source: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "product").write_text("half of it")
        raise RuntimeError("no compiler")

    with pytest.raises(RuntimeError, match="no compiler"):
        compiled.kept("library", [source], [], fail)
    folder = compiled.kept("library", [source], [], lambda folder: (folder / "whole").touch())
    assert [path.name for path in folder.iterdir()] == ["whole"]
