"""Several processes share one study on a PostgreSQL server."""

import time
from collections import Counter

import optuna
import pytest
from optuna.trial import TrialState
from postgres_server import MissingCapabilityError, postgres_server
from programs import start_python
from tuner_cli_cases import TUNE

from fastclip.tuner.report import StudyView, write_report
from fastclip.tuner.study.records import collect
from fastclip.tuner.training.explosion import WITH_SCORE

pytest.importorskip("psycopg", reason="psycopg is not installed (the extra `test`)")

N_TRIALS, N_FOLDS, N_WORKERS = 12, 2, 2
CONFIG = """
[study]
name = "shared"
storage = "{storage}"
n_trials = {n_trials}
max_epochs = 2
stale_after = 5
[model]
factory = "tuner_cases:pid_model"
[data]
source = "tuner_cases:blobs"
[cv]
folds = {n_folds}
[space]
lr = {{ low = 0.01, high = 1.0, log = true }}
folder = "{folder}"
"""


@pytest.fixture(scope="module")
def storage():
    """The storage URL of a server of one's own."""
    try:
        with postgres_server() as address:
            yield f"postgresql+psycopg://{address}"
    except MissingCapabilityError as missing:
        pytest.skip(str(missing))


@pytest.fixture
def start(tmp_path):
    """A function that starts a `fastclip tune` command."""
    processes = []

    def start(*arguments):
        processes.append(start_python(tmp_path, TUNE, *arguments))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()


@pytest.fixture
def database(storage):
    """The storage as this process reads it."""
    database = optuna.storages.RDBStorage(storage)
    yield database
    database.remove_session()
    database.engine.dispose()


def wait_until(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def test_killed_worker_costs_the_shared_study_no_trial(storage, database, start, tmp_path):
    pids = tmp_path / "pids"  # every process that trains leaves its number here
    pids.mkdir()
    config = tmp_path / "study.toml"
    config.write_text(CONFIG.format(storage=storage, n_trials=N_TRIALS, n_folds=N_FOLDS, folder=pids))
    runner = start("run", config, "-o", tmp_path / "run")
    wait_until(lambda: any(pids.iterdir()))
    workers = [
        start("worker", "--storage", storage, "--study", "shared", "--stale-after", 5)
        for _ in range(N_WORKERS)
    ]
    wait_until(lambda: (pids / str(workers[0].pid)).exists())
    workers[0].kill()  # while it trains its first fold
    for process in (runner, *workers[1:]):
        process.join(120)
        assert process.exitcode == 0, (tmp_path / "stderr").read_text()
    assert {int(path.name) for path in pids.iterdir()} == {process.pid for process in (runner, *workers)}

    study = optuna.load_study(study_name="shared", storage=database)
    states = Counter(trial.state for trial in study.trials)
    # Processes that ask at the same moment may each begin a last trial, also in the place of the copy.
    assert N_TRIALS <= states[TrialState.COMPLETE] < N_TRIALS + 1 + N_WORKERS
    (abandoned,) = [trial for trial in study.trials if trial.state == TrialState.FAIL]
    (copy,) = [t for t in study.trials if t.system_attrs.get("failed_trial") == abandoned.number]
    assert copy.params == abandoned.params
    assert copy.state in (TrialState.COMPLETE, TrialState.WAITING)
    rest = {trial.state for trial in study.trials if trial not in (abandoned, copy)}
    assert rest == {TrialState.COMPLETE}
    for record in collect(study, N_FOLDS):
        assert len(record.folds) == N_FOLDS
        assert all(fold.status in WITH_SCORE for fold in record.folds)

    view = StudyView.open(tmp_path / "run", database)
    assert f"{len(view.records)} of {N_TRIALS}" in write_report(view, tmp_path / "report.html").read_text()
