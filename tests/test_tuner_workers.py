"""Worker processes: folds that are lost, searches that are interrupted, and the same trials everywhere."""

import json
import multiprocessing.forkserver
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import optuna
import pytest
import torch
import tuner_cases as cases
from executor_cases import ExecutorContract, context, drain
from programs import forkserver

from fastclip.tuner import Choice, Float, MainGuardError, TunerCV, cross_validate
from fastclip.tuner.executors import starting
from fastclip.tuner.executors.base import device_slots
from fastclip.tuner.executors.choosing import make_executor
from fastclip.tuner.study.preparation import resolve_threads
from fastclip.tuner.training.explosion import Verdict
from fastclip.tuner.training.folds import FoldTask

optuna.logging.set_verbosity(optuna.logging.WARNING)


def is_running(pid):
    """Tell whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def pool():
    """Two workers that kill themselves, hang or train as the rate of a task says."""
    executor = make_executor("processes", context(cases.dangerous), n_jobs=2, devices=None)
    yield executor
    executor.close()


class TestProcesses(ExecutorContract):
    lost = "the worker process ended (exit code -9)"
    hung = "the worker took no step for"

    def test_workers_end_with_the_executor(self):
        executor = make_executor("processes", context(), n_jobs=1, devices=None)
        (pid,) = executor.pids
        assert pid != os.getpid()
        assert is_running(pid)
        executor.close()
        assert not is_running(pid)


NOTING_SCRIPT = """
import os
open(f"{__file__}.{os.environ.get('FASTCLIP_TEST_VARIABLE')}", "a").close()
"""


def as_script(path, code, monkeypatch):
    """Have workers take code for the script that they belong to; none is written where it is None."""
    if code is not None:
        path.write_text(code)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(path), raising=False)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere workers are spawned")
def test_workers_of_one_server_have_the_environment_and_limits_of_their_search(tmp_path, monkeypatch):
    servers, limits = set(), resource.getrlimit(resource.RLIMIT_DATA)
    try:
        for value, limit in (("one", 2**45), ("other", 2**46)):
            monkeypatch.setenv("FASTCLIP_TEST_VARIABLE", value)
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limits[1]))
            (folder := tmp_path / value).mkdir()
            params = {"folder": str(folder)}
            as_script(folder / "script.py", NOTING_SCRIPT, monkeypatch)
            cross_validate(cases.noting_surroundings, params, cases.blobs(), cv=2, max_epochs=1, n_jobs=2)
            here = str(os.getpid())  # where the parameters are tried out
            told = [json.loads(path.read_text()) for path in folder.glob("[0-9]*") if path.name != here]
            # A process that is forked from one that has spoken to the CUDA driver cannot do so any more.
            assert {(*given, is_bad) for *given, _, is_bad in told} == {(value, limit, False)}
            assert [path.suffix for path in folder.glob("script.py.*")] == [f".{value}"], "read too early"
            servers |= {parent for _, _, parent, _ in told}
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, limits)
    assert len(servers) == 1
    assert os.getpid() not in servers


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere workers are spawned")
def test_what_the_user_has_a_server_preload_stays(monkeypatch):
    server = multiprocessing.forkserver._forkserver
    for asked, kept in ((["__main__"], []), (["sqlite3", "csv"], ["sqlite3", "csv"])):
        monkeypatch.setattr(server, "_preload_modules", asked)
        for _ in range(2):
            starting.start_method()
            assert server._preload_modules == [*kept, *starting.PRELOADED]


@pytest.mark.parametrize("error", [ChildProcessError, EOFError])
def test_workers_are_spawned_where_no_server_answers(error, monkeypatch):
    methods, start = [], starting.start_by

    def without_server(context, *arguments):
        methods.append(context.get_start_method())
        if len(methods) == 1:
            raise error
        return start(forkserver, *arguments)  # sooner than spawned

    monkeypatch.setattr(starting, "start_by", without_server)
    executor = make_executor("processes", context(), n_jobs=1, devices=None, hang_timeout=60)
    executor.submit(FoldTask(0, 0, {"lr": 0.1}))
    assert [result.status for result in drain(executor, 1)] == [Verdict.OK]
    executor.close()
    assert methods[-1] == "spawn"
    assert len(methods) == 2


def test_search_survives_a_killed_worker_and_trains_folds_elsewhere(tmp_path):
    # One fold a trial: each that kills costs two workers, and its trial ends with the first.
    space = {"lr": Choice([0.1, cases.DEADLY, 0.2]), "folder": str(tmp_path)}
    search = TunerCV(
        cases.dangerous, space, sampler="grid", cv=0.5, max_epochs=2, n_jobs=2, refit=False
    ).fit(cases.blobs())  # fmt: skip
    assert [record.status for record in search.records_] == [Verdict.OK, Verdict.KILLED, Verdict.OK]
    assert search.study_.trials[1].state == optuna.trial.TrialState.FAIL
    assert str(os.getpid()) not in {path.name for path in tmp_path.iterdir()}


def test_any_number_of_jobs_gives_the_same_trials(tmp_path):
    # A random search draws the same trials; a fold after an exploded one must not count.
    tables = []
    for n_jobs in (1, 2):
        TunerCV(
            cases.nan_above_half, {"lr": Float(0.0, 1.0)}, sampler="random", n_trials=6, cv=3, max_epochs=3,
            n_jobs=n_jobs, output_dir=tmp_path / str(n_jobs),
        ).fit(cases.blobs())  # fmt: skip
        histories = sorted(path.name for path in (tmp_path / str(n_jobs) / "history").iterdir())
        tables.append(((tmp_path / str(n_jobs) / "trials.csv").read_bytes(), histories))
    assert tables[0] == tables[1]
    assert b"exploded" in tables[0][0]


def test_pruning_works_across_processes():
    space = {"lr": Choice([0.1, 0.2, 1e-7])}
    pruner = optuna.pruners.MedianPruner(n_startup_trials=1, n_warmup_steps=0)
    search = TunerCV(
        cases.mlp, space, sampler="grid", cv=2, max_epochs=4, n_jobs=2, refit=False, pruner=pruner
    ).fit(cases.blobs())  # fmt: skip
    assert [record.status for record in search.records_][2] is Verdict.PRUNED


def test_local_function_cannot_be_sent_and_the_message_says_so():
    with pytest.raises(TypeError, match=r"expected model_init, loss .* at the top level .* Use n_jobs=1"):
        TunerCV(lambda params: cases.mlp(params), {"lr": 0.1}, n_trials=1, n_jobs=2).fit(cases.blobs())


def test_a_model_that_workers_cannot_find_is_told_with_what_to_do(monkeypatch):
    typed_in = ModuleType("typed_in")
    exec("from tuner_cases import mlp\ndef model(params): return mlp(params)", vars(typed_in))
    monkeypatch.setitem(sys.modules, "typed_in", typed_in)
    with pytest.raises(TypeError, match=r"a worker cannot read .* 'typed_in'; expected .* use n_jobs=1"):
        cross_validate(typed_in.model, {"lr": 0.1}, cases.blobs(), cv=2, max_epochs=1, n_jobs=2)


def test_a_script_that_is_no_file_is_told_before_workers_run_it(tmp_path, monkeypatch):
    as_script(tmp_path / "<stdin>", None, monkeypatch)
    with pytest.raises(MainGuardError, match=r"<stdin>' is no file, .* Save it as one, or use n_jobs=1"):
        cross_validate(cases.mlp, {"lr": 0.1}, cases.blobs(), cv=2, max_epochs=1, n_jobs=2)


def test_slots_take_devices_in_turn():
    assert [str(device) for device in device_slots(["cpu", "meta"], 3)] == ["cpu", "meta", "cpu"]
    assert [str(device) for device in device_slots("cpu", 2)] == ["cpu", "cpu"]
    assert device_slots(torch.device("cpu"), 2) == [torch.device("cpu")] * 2


def test_cuda_stands_for_every_visible_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    found = [
        [str(slot) for slot in device_slots(devices, 3)] for devices in ("cuda", [torch.device("cuda")], None)
    ]
    assert found == [["cuda:0", "cuda:1", "cuda:0"]] * 3
    mixed = device_slots(["cpu", "cuda", torch.device("cuda", 1)], 5)
    assert [str(slot) for slot in mixed] == ["cpu", "cuda:0", "cuda:1", "cuda:1", "cpu"]


@pytest.mark.parametrize("count", [0, 2])
def test_an_absent_device_is_named_with_those_that_are_there(monkeypatch, count):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    wanted = "cuda" if count == 0 else "cuda:2"
    present = "cpu" if count == 0 else "cpu, cuda:0, cuda:1"
    with pytest.raises(
        ValueError, match=rf"devices has '{wanted}', which is not there; expected one of {present}\."
    ):
        device_slots(["cpu", wanted], 2)
    with pytest.raises(ValueError, match="devices has 'gpu'; expected the name of a device"):
        device_slots(["gpu"], 1)
    with pytest.raises(ValueError, match=r"devices has 1\.5; expected the name of a device"):
        device_slots([1.5], 1)


def test_threads_may_be_divided():
    assert resolve_threads("divide", 2, "test") == max(1, torch.get_num_threads() // 2)
    assert resolve_threads("divide", 1000, "test") == 1
    assert resolve_threads(None, 2, "test") is None


# Workers run the script, too, up to its guard.
SCRIPT = """
if __name__ == "__main__":
    import signal
    import sys
    import optuna
    import test_tuner_workers as tests

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background starts without it
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    tests.slow_search(sys.argv[1], sys.argv[2], n_jobs=2)
"""


def slow_search(output_dir, folder, **options):
    """Two trials of three folds, each longer than 0.6 s; `folder` collects the pids that trained."""
    space = {"lr": Choice([0.1, 0.2]), "folder": str(folder)}
    settings = {"sampler": "grid", "cv": 3, "max_epochs": 3, "output_dir": output_dir, **options}
    return TunerCV(cases.pid_model, space, **settings).fit(cases.blobs())


def test_ctrl_c_stops_cleanly_and_resume_goes_on_at_the_fold(tmp_path):
    (tmp_path / "pids").mkdir()
    (tmp_path / "search.py").write_text(SCRIPT)
    history, here = tmp_path / "run" / "history", Path(__file__).parent
    with subprocess.Popen(
        [sys.executable, tmp_path / "search.py", tmp_path / "run", tmp_path / "pids"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)])},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as search:
        try:
            wait_until(lambda: history.exists() and len(list(history.glob("*.json"))) >= 2)
            os.killpg(search.pid, signal.SIGINT)  # as a terminal does: parent, server and workers
            _, errors = search.communicate(timeout=60)
        finally:
            search.kill()
    assert "KeyboardInterrupt" in errors
    # SQLAlchemy tells of its own when it is interrupted while it closes a connection.
    own = errors.count("Exception closing connection")
    assert errors.count("Traceback") - own == 1, "the workers must not join in"
    workers = [int(path.name) for path in (tmp_path / "pids").iterdir()]
    wait_until(lambda: not any(is_running(pid) for pid in workers), 10)
    done = {path.name: path.stat().st_mtime_ns for path in history.glob("*.json")}
    assert 2 <= len(done) < 6

    slow_search(tmp_path / "run", tmp_path / "pids", resume=True)
    assert {name: (history / name).stat().st_mtime_ns for name in done} == done, "no fold is trained twice"
    assert len(list(history.glob("*.json"))) == 6
    slow_search(tmp_path / "whole", tmp_path / "pids")
    assert (tmp_path / "whole" / "trials.csv").read_bytes() == (tmp_path / "run" / "trials.csv").read_bytes()


def test_workers_of_a_killed_parent_end_too(tmp_path):
    (tmp_path / "pids").mkdir()
    search = forkserver.Process(target=slow_search, args=(None, tmp_path / "pids"), kwargs={"n_jobs": 2})
    search.start()
    wait_until(lambda: len(list((tmp_path / "pids").iterdir())) == 2)
    search.kill()
    search.join()
    workers = [int(path.name) for path in (tmp_path / "pids").iterdir()]
    wait_until(lambda: not any(is_running(pid) for pid in workers), 20)


def test_folds_of_the_searches_have_the_times_they_took():
    result = cross_validate(cases.slow, {"batch_size": 30}, cases.blobs(), cv=3, max_epochs=2)
    # Two steps of 50 ms an epoch, and one call to measure.
    assert (result["fit_time"] >= 0.2).all()
    assert (result["score_time"] >= 0.1).all()
    assert np.isfinite(result["mean_test_score"])
