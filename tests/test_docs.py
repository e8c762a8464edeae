"""The pages in docs/: what they tell a reader to type runs as it stands, from top to bottom."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from programs import start_python

ROOT = Path(__file__).parent.parent
TUNING = ROOT / "docs" / "tuning.md"
MONITOR = ROOT / "docs" / "monitor.md"

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE_NAME = re.compile(r"# (\S+\.(?:py|toml))\n")

COMMANDS = """
import sys
from fastclip.cli import cli
for line in sys.argv[1:]:
    try:
        cli(line.split()[1:])
    except SystemExit as end:
        if end.code:
            raise
"""


# What a page hands to other services, as far as it calls them.
SERVICES = {
    "wandb": "def init(project): pass\ndef log(values): print('wandb', values)\n",
    "mlflow": "def log_metrics(values, step): print('mlflow', step, values)\n",
}


def blocks(language, page=TUNING):
    """The blocks of one language that are to be run or saved, in the order of the page."""
    return [text for kind, text in BLOCK.findall(page.read_text(encoding="utf-8")) if kind == language]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the reader works: the files that the page says to save are there."""
    made = tmp_path_factory.mktemp("reader")
    for text in [*blocks("python"), *blocks("toml")]:
        if named := FILE_NAME.match(text):
            (made / named[1]).write_text(text, encoding="utf-8")
    return made


def run_in(folder, code, *arguments):
    """Run code in a folder. One thread: several gain nothing on networks this small."""
    process = start_python(folder, f"import torch\ntorch.set_num_threads(1)\n{code}", *arguments)
    process.join(240)
    assert process.exitcode == 0, (folder / "stderr").read_text()
    return (folder / "stdout").read_text()


def test_code_runs_from_nan_to_a_network_that_learns(folder):
    code = [text for text in blocks("python") if not FILE_NAME.match(text)]
    assert len(code) == 5
    page = "\n".join(code)  # half the trials are enough
    assert page.count("n_trials=12") == 1
    log = run_in(folder, page.replace("n_trials=12", "n_trials=6"))
    assert re.search(r"the loss is (nan|inf); the last norms were .*'(nan|inf)'\]", log)
    assert "'0.weight': Nonfinite(" in log
    assert "exploded at step" in log
    assert "max_norm None: accuracy -inf, 0% of steps clipped" in log
    assert "chosen: {'lr_x_max_norm':" in log
    on_new_data = re.search(r"on new data (\S+)", log)
    assert float(on_new_data[1]) > 0.85
    loss = re.search(r"after 500 steps the loss is (\S+);", log)
    assert float(loss[1]) < 1.0
    assert (folder / "runs" / "first" / "report.html").stat().st_size > 0


def test_the_page_of_the_monitor_runs(tmp_path):
    for name, code in SERVICES.items():
        (tmp_path / f"{name}.py").write_text(code, encoding="utf-8")
    code = blocks("python", MONITOR)
    step = "cross_entropy(net(x), y).backward()\noptimizer.step()\nmonitor.close()"
    page = [f"{text}\n{step}" if re.match("import (wandb|mlflow)", text) else text for text in code]
    log = run_in(tmp_path, "\n".join(page))
    assert "max_norm=" in log
    assert "wandb {'fastclip/norm': " in log
    assert "mlflow 1 {'fastclip/norm': " in log
    commands = [line.partition("#")[0] for text in blocks("sh", MONITOR) for line in text.splitlines()]
    assert [line.split()[:2] for line in commands] == [["fastclip", "monitor"]] * 3
    log = run_in(tmp_path, COMMANDS, *commands)
    assert "skipped" in log
    assert "Begin with max_norm=" in log
    assert (tmp_path / "runs" / "first" / "report.html").stat().st_size > 0


def test_every_section_about_a_trainer_is_run_where_it_is_installed():
    text = (ROOT / "docs" / "trainers.md").read_text(encoding="utf-8")
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests" / "clients").glob("*.py"))
    titles = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert titles
    assert [title for title in titles if f'"{title}"' not in tests] == []


def test_commands_run(folder):
    commands = [
        line for text in blocks("sh") for line in text.splitlines() if line.startswith("fastclip tune ")
    ]
    names = [line.split()[2] for line in commands]
    assert names == ["validate", "suggest-clip", "run", "status", "report"]
    log = run_in(folder, COMMANDS, *commands)
    assert "3 trials: best" in log
    assert (folder / "runs" / "second" / "report.html").stat().st_size > 0
    assert list((folder / "runs" / "second" / "plots").glob("*.png"))
