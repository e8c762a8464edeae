"""The benchmark engine: what is timed is right, fairly ordered and stored whole. No speed is looked at."""

from __future__ import annotations

import dataclasses
import functools
import gc
import itertools
import json
import operator
import os
import pickle
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import fastclip
from fastclip import files
from fastclip.bench import (
    DTYPES,
    MODES,
    WORKLOADS,
    Case,
    CheckError,
    Options,
    Peer,
    Workload,
    devices,
    run,
    runner,
)
from fastclip.bench import environment as environment_module
from fastclip.bench.bandwidth import Bandwidth, Memory
from fastclip.bench.cases import Clipping, Traffic
from fastclip.bench.check import check
from fastclip.bench.isolation import apart, here
from fastclip.bench.models import gradients
from fastclip.bench.peers import FASTCLIP, PEERS
from fastclip.bench.plot import save_plot
from fastclip.bench.progress import ConsoleProgress
from fastclip.bench.results import Results, ResultsError, load, save, write_json
from fastclip.bench.table import WIDTH, render
from fastclip.bench.timing import MIN_ROUNDS, Measurement, interleave, rounds

ROOT = Path(__file__).resolve().parents[1]
SMALL = Workload("small", "three small tensors", ((300, 7), (1,), (1000,)))
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize(
    ("name", "num_tensors", "numel"),
    [
        ("gpt2", 148, 124_439_808),
        ("resnet50", 161, 25_557_032),
        ("vit-b16", 152, 86_567_656),
        ("lstm-lm", 11, 19_780_400),
        ("llama3-8b-layer", 9, 218_112_000),
        ("tiny", 1000, 16_000),
        ("flat", 1, 67_108_864),
    ],
)
def test_workload_has_the_published_size(name: str, num_tensors: int, numel: int) -> None:
    assert (WORKLOADS[name].num_tensors, WORKLOADS[name].numel) == (num_tensors, numel)


def test_every_workload_has_a_size_in_the_test_above() -> None:
    assert len(WORKLOADS) == 7


def test_lstm_shapes_are_those_of_torch() -> None:
    with torch.device("meta"):
        modules = [torch.nn.Embedding(10_000, 650), torch.nn.LSTM(650, 650, 2), torch.nn.Linear(650, 10_000)]
    shapes = [tuple(parameter.shape) for module in modules for parameter in module.parameters()]
    assert list(WORKLOADS["lstm-lm"].shapes) == shapes


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_gradients_are_seeded_standard_normal(dtype: torch.dtype) -> None:
    first, again, other = (gradients(SMALL.parameters(dtype, seed=seed)) for seed in (3, 3, 4))
    assert [tuple(grad.shape) for grad in first] == list(SMALL.shapes)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert first[0].dtype == dtype
    assert first[0].double().std() == pytest.approx(1.0, abs=0.1)


def test_quantiles_of_known_times() -> None:
    measured = Measurement.of([milliseconds / 1e3 for milliseconds in range(101)])
    assert measured.num_rounds == 101
    assert measured.quantiles_ms == pytest.approx({q: q for q in (0, 5, 20, 50, 80, 95, 100)})
    assert (measured.p20_ms, measured.median_ms, measured.p80_ms) == pytest.approx((20, 50, 80))


def test_rounds_let_every_peer_follow_every_other_equally_often() -> None:
    orders = list(itertools.islice(rounds(["a", "b", "c"]), 12))
    assert sorted(orders[:6]) == sorted(itertools.permutations("abc"))
    assert orders[6:] == orders[:6]


def test_interleave_calls_each_peer_once_a_round_and_drops_the_first() -> None:
    called: list[str] = []
    prepared: list[int] = []

    def stopwatch(call: Callable[[], object]) -> float:
        call()
        return float(len(called))

    calls = {name: functools.partial(called.append, name) for name in "abc"}
    measured = interleave(
        calls, budget_s=0, before=lambda: prepared.append(len(called)), stopwatch=stopwatch, min_rounds=4
    )
    assert len(called) == 3 * 5
    assert all(sorted(called[i : i + 3]) == ["a", "b", "c"] for i in range(0, 15, 3))
    assert prepared == list(range(15))
    for name, measurement in measured.items():
        times = [1e3 * (i + 1) for i, other in enumerate(called) if other == name and i >= 3]
        assert measurement.num_rounds == 4
        assert (measurement.quantiles_ms[0], measurement.quantiles_ms[100]) == (times[0], times[-1])


def test_interleave_stops_at_its_largest_number_of_rounds() -> None:
    measured = interleave({"a": lambda: None}, budget_s=60, max_rounds=11)
    assert measured["a"].num_rounds == 11


def test_interleave_switches_the_collector_back_on() -> None:
    seen: list[bool] = []

    def fail() -> None:
        seen.append(gc.isenabled())
        raise KeyError

    with pytest.raises(KeyError):
        interleave({"a": fail}, budget_s=0)
    assert seen == [False]
    assert gc.isenabled()


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_active_clipping_stays_active_and_never_decays(dtype: torch.dtype, peer: Peer) -> None:
    parameters = SMALL.parameters(dtype)
    start = fastclip.reference.total_norm(gradients(parameters), 2.0)
    clipping = Clipping([parameters], "active", start)
    call = clipping.call(peer)
    for _ in range(150):
        clipping.prepare()
        norm = fastclip.reference.total_norm(clipping.gradients, 2.0)
        assert 0.45 * start < norm < 1.01 * start
        assert 0.95 < clipping.max_norm / norm < 1
        call()


@pytest.mark.parametrize("mode", ["inactive", "norm"])
def test_other_modes_write_nothing(mode: str) -> None:
    parameters = SMALL.parameters(torch.float32)
    before = [grad.clone() for grad in gradients(parameters)]
    clipping = Clipping([parameters], mode, fastclip.reference.total_norm(before, 2.0))
    for peer in PEERS:
        clipping.prepare()
        clipping.call(peer)()
    assert all(torch.equal(a, b) for a, b in zip(before, gradients(parameters), strict=True))


@pytest.mark.parametrize(("mode", "passes"), [("norm", 1), ("inactive", 1), ("active", 3)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_byte_model(mode: str, passes: int, dtype: str) -> None:
    case = Case(SMALL, dtype, mode)
    assert case.traffic.nbytes == passes * 3101 * DTYPES[dtype].itemsize


def test_floor_adds_reading_and_updating() -> None:
    bandwidth = Bandwidth(20.0, "r", 40.0, "u", {})
    assert bandwidth.floor_ms(Traffic(20_000_000, 0)) == pytest.approx(1.0)
    assert bandwidth.floor_ms(Traffic(20_000_000, 80_000_000)) == pytest.approx(3.0)


def test_bandwidth_is_the_fastest_candidate() -> None:
    memory = Memory(numel=1 << 12)
    bandwidth = memory.measure(budget_s=0)
    rates = bandwidth.candidates_gbps
    assert bandwidth.read_gbps == rates[bandwidth.read_by]
    assert bandwidth.update_gbps == rates[bandwidth.update_by]
    assert bandwidth.read_gbps == max(rates[name] for name in memory.reads)
    assert bandwidth.update_gbps == max(rates[name] for name in memory.updates)
    again = memory.measure(budget_s=0, only=(bandwidth.read_by, bandwidth.update_by))
    assert list(again.candidates_gbps) == [bandwidth.read_by, bandwidth.update_by]


@pytest.mark.parametrize("dtype", DTYPES)
def test_check_passes_and_reports_errors(dtype: str) -> None:
    found = check(SMALL, dtype, PEERS)
    assert list(found.relative_errors) == [peer.name for peer in PEERS]
    assert found.relative_errors["fastclip"] <= 2e-7
    if dtype == "bfloat16":
        assert found.relative_errors["torch_foreach"] > 1e-5


def norm_off(parameters: list[torch.nn.Parameter], max_norm: float) -> torch.Tensor:
    return FASTCLIP.clip(parameters, max_norm) * 1.000001


def norm_nan(parameters: list[torch.nn.Parameter], max_norm: float) -> torch.Tensor:
    return FASTCLIP.clip(parameters, max_norm) * float("nan")


def writes_unasked(parameters: list[torch.nn.Parameter], max_norm: float) -> torch.Tensor:
    norm = FASTCLIP.clip(parameters, max_norm)
    if max_norm > norm:
        gradients(parameters)[1].add_(1)
    return norm


def misses_the_last_element(parameters: list[torch.nn.Parameter], max_norm: float) -> torch.Tensor:
    last = gradients(parameters)[-1][-1].clone()
    norm = FASTCLIP.clip(parameters, max_norm)
    gradients(parameters)[-1][-1] = last
    return norm


def makes_a_nan(parameters: list[torch.nn.Parameter], max_norm: float) -> torch.Tensor:
    norm = FASTCLIP.clip(parameters, max_norm)
    if max_norm < norm:
        gradients(parameters)[0][0, 0] = float("nan")
    return norm


@pytest.mark.parametrize(
    ("clip", "complaint"),
    [
        (norm_off, "norm returned by an inactive clip"),
        (norm_nan, "norm returned by an inactive clip"),
        (writes_unasked, "changed gradient 1"),
        (misses_the_last_element, "scaled gradient 2 wrongly"),
        (makes_a_nan, "scaled gradient 0 wrongly"),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_check_is_red_for_a_wrong_clip(
    dtype: str, clip: Callable[[list[torch.nn.Parameter], float], torch.Tensor], complaint: str
) -> None:
    with pytest.raises(CheckError, match=f"small {dtype}: .*{complaint}"):
        check(SMALL, dtype, [dataclasses.replace(FASTCLIP, clip=clip)])


def test_check_is_red_for_a_wrong_norm() -> None:
    wrong = dataclasses.replace(FASTCLIP, norm=lambda grads: FASTCLIP.norm(grads) * 1.000001)
    with pytest.raises(CheckError, match="the norm by fastclip is"):
        check(SMALL, "float32", [wrong])


def test_red_check_stops_all_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[str] = []
    monkeypatch.setattr(devices, "interleave", lambda *_, **__: timed.append("case"))
    monkeypatch.setattr(runner, "Memory", lambda: timed.append("bandwidth"))
    monkeypatch.setitem(runner.WORKLOADS, "small", SMALL)
    wrong = [dataclasses.replace(FASTCLIP, clip=writes_unasked), *PEERS[1:]]
    with pytest.raises(CheckError):
        run(Options(models=("small",), dtypes=("float32", "bfloat16")), peers=wrong)
    assert timed == []


@pytest.fixture(scope="module")
def results() -> Results:
    """A whole run over small workloads that carry the names of the README's."""
    names = ("gpt2", "resnet50", "tiny", "flat")
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setitem(runner.WORKLOADS, name, dataclasses.replace(SMALL, name=name, title=name.upper()))
        patch.setattr(runner, "Memory", functools.partial(Memory, numel=1 << 12))
        return run(Options(models=names, threads=1, time_budget_s=1e-3))


def test_a_process_of_its_own_returns_or_raises() -> None:
    assert apart(os.getpid) != here(os.getpid) == os.getpid()
    with pytest.raises(ZeroDivisionError):
        apart(operator.truediv, 1, 0)


def test_peers_can_be_sent_to_another_process() -> None:
    for peer in pickle.loads(pickle.dumps(PEERS)):
        assert float(peer.norm([torch.tensor([3.0, 4.0])])) == 5.0


def test_rows_are_timed_where_the_caller_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "Memory", functools.partial(Memory, numel=1 << 12))
    monkeypatch.setitem(runner.WORKLOADS, "small", SMALL)
    applied: list[str] = []

    def recording(function: Callable[..., Any], *arguments: Any) -> Any:
        applied.append(function.__name__)
        return function(*arguments)

    options = Options(models=("small",), dtypes=("float32", "float16"), threads=1, time_budget_s=1e-3)
    assert len(run(options, apply=recording).rows) == 2 * len(MODES)
    assert applied == ["time_workload"] * 2


def test_run_times_every_case_with_every_peer(results: Results) -> None:
    cases = [(row.model, row.dtype, row.mode) for row in results.rows]
    assert cases == list(
        itertools.product(("gpt2", "resnet50", "tiny", "flat"), ("float32", "bfloat16"), MODES)
    )
    for row in results.rows:
        assert list(row.measurements) == [peer.name for peer in PEERS]
        assert all(measured.num_rounds >= MIN_ROUNDS for measured in row.measurements.values())
        assert row.ratio("torch_loop") == (
            row.measurements["torch_loop"].median_ms / row.measurements["fastclip"].median_ms
        )


def test_threads_are_given_back() -> None:
    before = torch.get_num_threads()
    with runner.torch_threads(1):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_results_survive_the_file(results: Results, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    save(results, path)
    read = load(path)
    assert read.rows == results.rows
    assert read.environment == results.environment
    assert read.bandwidth == results.bandwidth
    assert read.options["models"] == list(results.options["models"])
    derived = json.loads(path.read_text(encoding="utf-8"))["rows"][0]["derived"]
    assert derived["ratios"]["torch_foreach"] == results.rows[0].ratio("torch_foreach")


def test_each_row_has_a_line(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    content = {"n": [1, 2], "rows": [{"x": 1}, {"x": 2}], "part": {"n": [1, 2], "rows": [{"y": 1}, {"y": 2}]}}
    write_json(path, content)
    assert json.loads(path.read_text(encoding="utf-8")) == content
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [line.strip(" ,") for line in lines if '"x"' in line] == ['{"x": 1}', '{"x": 2}']
    assert [line.strip(" ,") for line in lines if '"y"' in line] == ['{"y": 1}', '{"y": 2}']
    assert ' "n": [1, 2],' in lines


def test_an_interrupted_save_leaves_the_old_file(
    results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "results.json"
    path.write_text("old", encoding="utf-8")

    def fail(source: object, target: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        save(results, path)
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]
    assert path.read_text(encoding="utf-8") == "old"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "no such file"),
        ("{", "not a results file"),
        ("[]", "not a results file"),
        ('{"schema": "fastclip-bench/0"}', "expected 'fastclip-bench/1'"),
        ('{"schema": "fastclip-bench/1"}', "not a results file"),
    ],
)
def test_load_names_what_is_wrong(tmp_path: Path, content: str | None, complaint: str) -> None:
    path = tmp_path / "results.json"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(ResultsError, match=complaint):
        load(path)


def test_a_missing_row_is_named(results: Results) -> None:
    with pytest.raises(ResultsError, match="no row for gpt2 float64 norm"):
        results.find("gpt2", "float64", "norm")


def test_table_shows_every_row_on_one_line(results: Results) -> None:
    console = Console(width=WIDTH)
    with console.capture() as capture:
        console.print(render(results))
    lines = [
        line for line in capture.get().splitlines() if f"{results.rows[0].ratio('torch_loop'):.2f}x" in line
    ]
    assert lines
    assert "GPT2" in lines[0]
    assert sum(any(f" {mode} " in line for mode in MODES) for line in capture.get().splitlines()) >= len(
        results.rows
    )


def test_plot_is_a_png(results: Results, tmp_path: Path) -> None:
    save_plot(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(PNG_SIGNATURE)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_progress_passes_items_on(is_terminal: bool) -> None:
    console = Console(force_terminal=is_terminal, width=80)
    with console.capture() as capture:
        assert list(ConsoleProgress(console)(iter("ab"), 2, "check")) == ["a", "b"]
    assert ("check 2/2  b" in capture.get()) is not is_terminal


def git(root: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    subprocess.run(["git", "-C", str(root), *identity, *arguments], check=True, capture_output=True)


def test_commit_says_dirty_only_for_measured_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "fastclip" / "__init__.py"
    package.parent.mkdir()
    package.write_text("", encoding="utf-8")
    (tmp_path / "README.md").write_text("", encoding="utf-8")
    monkeypatch.setattr(environment_module.fastclip, "__file__", str(package))
    git(tmp_path, "init")
    assert environment_module.commit() == "unknown"
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    (tmp_path / "README.md").write_text("changed", encoding="utf-8")
    assert len(environment_module.commit()) == 12
    package.write_text("changed", encoding="utf-8")
    assert environment_module.commit().endswith("-dirty")
