"""The command line: what it prints, where it writes, how it ends."""

from __future__ import annotations

import functools
import io
import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from programs import run_python
from rich.console import Console

import fastclip
from fastclip import backends
from fastclip.bench import DTYPES, MODES, WORKLOADS, CheckError, isolation, report, runner
from fastclip.bench.bandwidth import Memory
from fastclip.cli import cli

SMALL_RUN = ["bench", "--models", "tiny", "--dtype", "float32", "--time-budget", "0.001"]


@pytest.fixture
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "Memory", functools.partial(Memory, numel=1 << 12))


@pytest.mark.parametrize("arguments", [["--help"], ["info", "--help"], ["bench", "--help"], ["demo", "-h"]])
def test_help_shows_an_example(arguments: list[str]) -> None:
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0
    assert "fastclip " in result.output.partition("Usage: ")[2].partition("\n")[2]


def test_version() -> None:
    assert fastclip.__version__ in CliRunner().invoke(cli, ["--version"]).output


def test_info_names_every_backend_and_its_reason() -> None:
    result = CliRunner().invoke(cli, ["info"])
    assert result.exit_code == 0
    words = result.output.split()
    assert torch.__version__ in words
    for name, backend in fastclip.backend_info().items():
        assert name in words
        assert backend.reason.split()[0] in words


def test_info_tells_of_a_wrong_variable_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTCLIP_BACKEND", "nonsense")
    monkeypatch.setattr(backends, "_from_environment", backends._from_environment.__wrapped__)
    result = CliRunner().invoke(cli, ["info"])
    assert result.exit_code == 1
    assert result.output.startswith("Error: FASTCLIP_BACKEND: no backend 'nonsense'; expected one of auto")


def test_info_shows_reasons_as_they_are() -> None:
    facts = report.installation()
    facts["backends"]["triton"]["reason"] = "pip install 'fastclip[gpu]'"
    console = Console(file=io.StringIO(), width=200)
    console.print(report.render(facts))
    assert "fastclip[gpu]" in console.file.getvalue()


def test_info_as_json() -> None:
    facts = json.loads(CliRunner().invoke(cli, ["info", "--json"]).stdout)
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["hardware"]["threads"] == torch.get_num_threads()
    assert {name: entry["available"] for name, entry in facts["backends"].items()} == {
        name: backend.available for name, backend in fastclip.backend_info().items()
    }


@pytest.mark.usefixtures("small_buffers")
def test_bench_prints_a_table_and_writes_files(tmp_path: Path) -> None:
    json_path, plot_path = tmp_path / "new" / "results.json", tmp_path / "new" / "results.png"
    result = CliRunner().invoke(
        cli, [*SMALL_RUN, "--threads", "1", "--json", str(json_path), "--plot", str(plot_path)]
    )
    assert result.exit_code == 0, result.output
    assert "1000 tensors of 16" in result.stdout
    assert "check 1/1" in result.stderr
    assert "time 3/3" in result.stderr
    content = json.loads(json_path.read_text(encoding="utf-8"))
    assert [row["mode"] for row in content["rows"]] == list(MODES)
    assert content["options"]["threads"] == 1
    assert plot_path.stat().st_size > 0


@pytest.mark.usefixtures("small_buffers")
def test_bench_takes_names_by_comma_and_by_repetition(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(isolation, "apart", isolation.here)
    path = tmp_path / "results.json"
    arguments = ["--modes", "active,norm", "--modes", "active", "--dtype", "float16", "--json", str(path)]
    result = CliRunner().invoke(cli, [*SMALL_RUN, *arguments])
    assert result.exit_code == 0, result.output
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert [(row["dtype"], row["mode"]) for row in rows] == [
        ("float32", "norm"),
        ("float32", "active"),
        ("float16", "norm"),
        ("float16", "active"),
    ]


@pytest.mark.parametrize(
    ("option", "choices"), [("--models", WORKLOADS), ("--dtype", DTYPES), ("--modes", MODES)]
)
def test_bench_lists_the_choices_for_an_unknown_name(option: str, choices: dict[str, object]) -> None:
    result = CliRunner().invoke(cli, ["bench", option, f"{next(iter(choices))},gpt5"])
    assert result.exit_code == 2
    message = " ".join(result.stderr.split())
    assert f"Invalid value for '{option}': 'gpt5' is unknown" in message
    assert ", ".join(choices) in message


@pytest.mark.parametrize(
    "arguments",
    [
        ["--threads", "0"],
        ["--time-budget", "0"],
        ["--json", "results.txt"],
        ["--plot", "results.jpg"],
        ["--json", "/dev/null/results.json"],
    ],
)
def test_bench_turns_down_what_it_cannot_do_before_any_work(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastclip.bench.run", lambda *_, **__: pytest.fail("the run was started"))
    result = CliRunner().invoke(cli, ["bench", *arguments])
    assert result.exit_code == 2
    assert f"Invalid value for '{arguments[0]}'" in result.stderr


def test_bench_ends_with_1_and_no_file_when_the_check_is_red(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def red(*_: object, **__: object) -> None:
        raise CheckError("tiny float32: the norm is wrong")

    monkeypatch.setattr(runner, "check", red)
    path = tmp_path / "results.json"
    result = CliRunner().invoke(cli, [*SMALL_RUN, "--json", str(path)])
    assert result.exit_code == 1
    assert "nothing was timed" in result.stderr
    assert "tiny float32: the norm is wrong" in result.stderr
    assert not path.exists()


def test_demo_passes_its_options_and_exit_code_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []

    def run(output: Path, **options: object) -> int:
        seen.append((output, options))
        return 3

    monkeypatch.setattr("fastclip.demo.run", run)
    images = tmp_path / "images"
    images.mkdir()
    result = CliRunner().invoke(
        cli,
        [
            *("demo", "--task", "imagefolder", "--data", str(images), "--output", str(tmp_path)),
            *("--epochs", "2", "--seed", "5", "--no-search", "--model", "four-conv", "--size", "48"),
            "--skip-unreadable",
        ],
    )
    assert result.exit_code == 3
    options = {"task": "imagefolder", "data": images, "epochs": 2, "seed": 5, "search": False}
    assert seen == [(tmp_path, {**options, "model": "four-conv", "size": 48, "skip_unreadable": True})]


def test_demo_has_its_own_epochs_and_ends_with_a_search(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, object] = {}
    monkeypatch.setattr("fastclip.demo.run", lambda output, **options: seen.update(options) or 0)
    assert CliRunner().invoke(cli, ["demo"]).exit_code == 0
    plain = {"task": "digits", "data": None, "epochs": None, "seed": 0, "search": None}
    assert seen == {**plain, "model": None, "size": None, "skip_unreadable": False}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "cifar10"], "cifar10 needs a folder to read. Name it by --data."),
        (["--task", "charlm", "--data", "."], "charlm, which brings its data; expected none."),
        (["--task", "mnist", "--data", "."], "holds neither train-images-idx3-ubyte nor"),
        (["--task", "mnist", "--data", "nowhere"], "'nowhere' does not exist"),
        (["--task", "imagenet"], "'imagenet' is not one of 'digits', 'charlm'"),
        (["--model", "resnet"], "'resnet' is not one of 'three-conv', 'four-conv', 'batch-norm'"),
        (["--task", "charlm", "--model", "simple"], "charlm, which predicts characters; expected none."),
        (["--task", "charlm", "--search"], "a search is asked of charlm; expected a task that sorts."),
        (["--size", "9"], "size=9 is given to digits; expected none. It is for imagefolder."),
        (["--skip-unreadable"], "is given to digits, whose files are all needed; expected False."),
    ],
)
def test_demo_turns_down_data_before_any_work(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastclip.bench.run", lambda *_, **__: pytest.fail("the run was started"))
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli, ["demo", *arguments])
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert list(tmp_path.iterdir()) == []


def test_demo_offers_every_task_and_network() -> None:
    from fastclip.demo.models import IMAGE_NETWORKS, TEXT_NETWORKS
    from fastclip.demo.tasks import TASKS

    options = {option.name: option for option in cli.commands["demo"].params}
    assert tuple(options["task"].type.choices) == TASKS
    assert tuple(options["model"].type.choices) == (*IMAGE_NETWORKS, *TEXT_NETWORKS)


@pytest.mark.parametrize(
    ("module", "extra", "arguments"),
    [
        ("click", "cli", ["--help"]),
        ("rich", "cli", ["info"]),
        ("matplotlib", "report", ["bench", "--models", "tiny", "--plot", "x.png"]),
        ("sklearn", "demo", ["demo"]),
        ("optuna", "tune", ["tune", "--help"]),
        ("PIL", "demo", ["demo"]),
        ("optuna", "demo", ["demo"]),
    ],
)
def test_a_missing_extra_says_its_name(module: str, extra: str, arguments: list[str]) -> None:
    program = f"import sys; sys.modules[{module!r}] = None; from fastclip.cli import main; main()"
    result = run_python(program, *arguments)
    assert result.returncode == 2, result.stderr
    assert f"{module} is not installed" in result.stderr
    assert f"pip install 'fastclip[{extra}]'" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"]])
def test_tune_hands_its_arguments_on(arguments: list[str]) -> None:
    result = CliRunner().invoke(cli, ["tune", *arguments])
    assert result.exit_code == 0
    usage = " ".join(["Usage: fastclip tune", *arguments[:-1]])
    assert result.output.startswith(usage)


def test_tune_does_not_hide_the_exit_code(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["tune", "validate", str(tmp_path / "nowhere.toml")])
    assert result.exit_code != 0
    assert "nowhere.toml does not exist" in result.output


def test_another_missing_module_is_no_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastclip import cli as cli_module

    def fail() -> None:
        raise ModuleNotFoundError("No module named 'numpy'", name="numpy")

    monkeypatch.setattr(cli_module, "cli", fail)
    with pytest.raises(ModuleNotFoundError, match="numpy"):
        cli_module.main()
