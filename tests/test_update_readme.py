"""The README's tables are what the results files say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import update_readme

from fastclip.bench.results import load

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def readme_with(name: str, tmp_path: Path) -> Path:
    readme = tmp_path / "README.md"
    begin, end = update_readme.markers(name)
    readme.write_text(f"above\n{begin}\nold\n{end}\nbelow\n", encoding="utf-8")
    return readme


def test_cpu_table_is_written_from_the_file(tmp_path: Path) -> None:
    results = load(RESULTS / "cpu.json")
    readme = readme_with("cpu", tmp_path)
    shutil.copy(RESULTS / "cpu.json", tmp_path)
    arguments = ["--readme", str(readme), "--results", str(tmp_path), "--tables", "cpu"]
    assert update_readme.main([*arguments, "--check"]) == 1
    assert "\nold\n" in readme.read_text(encoding="utf-8")
    assert update_readme.main(arguments) == 0
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("above\n")
    assert text.endswith("\nbelow\n")
    assert "\nold\n" not in text
    for fact in (
        f"**{results.find('gpt2', 'bfloat16', 'active').ratio('torch_foreach'):.1f}x**",
        f"{results.find('tiny', 'float32', 'norm').relative_errors['torch_foreach']:.1e}",
        f"{results.find('flat', 'float32', 'norm').share:.0%} of the",
        results.environment.commit,
        results.environment.hardware.cpu,
        f"torch {results.environment.versions['torch']}",
        f"{results.options['threads']} threads",
    ):
        assert fact in text
    assert update_readme.main([*arguments, "--check"]) == 0


def test_tuner_table_is_written_from_the_file(tmp_path: Path) -> None:
    committed = RESULTS / "tuner.json"
    shutil.copy(committed, tmp_path)
    readme = readme_with("tuner", tmp_path)
    arguments = ["--readme", str(readme), "--results", str(tmp_path), "--tables", "tuner"]
    assert update_readme.main(arguments) == 0
    searches = json.loads(committed.read_text(encoding="utf-8"))["searches"]
    text = readme.read_text(encoding="utf-8")
    assert ", ".join(f"{accuracy:.1%}" for accuracy in searches["test_accuracy"]) in text


def test_the_readme_says_what_the_committed_files_say() -> None:
    assert update_readme.main(["--check"]) == 0


@pytest.mark.parametrize(
    ("readme_text", "with_results", "complaint"),
    [
        (None, True, "README.md: no such file"),
        ("no markers", True, "Put both on lines of their own"),
        ("<!-- bench:cpu:end --><!-- bench:cpu:begin -->", True, "Put both on lines of their own"),
        ("<!-- bench:cpu:begin --><!-- bench:cpu:end -->", False, "cpu.json: no such file"),
    ],
)
def test_what_is_missing_is_named(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    readme_text: str | None,
    with_results: bool,
    complaint: str,
) -> None:
    readme = tmp_path / "README.md"
    if readme_text is not None:
        readme.write_text(readme_text, encoding="utf-8")
    if with_results:
        shutil.copy(RESULTS / "cpu.json", tmp_path)
    arguments = ["--readme", str(readme), "--results", str(tmp_path), "--tables", "cpu"]
    assert update_readme.main(arguments) == 1
    assert complaint in capsys.readouterr().err
