"""The Ray executor on a cluster of this machine: a head without CPUs and two workers with one each."""

import os
import sys
from pathlib import Path

import optuna
import pytest
import tuner_cases as cases
from executor_cases import ExecutorContract, context

from fastclip.tuner import Choice, TunerCV
from fastclip.tuner.executors.choosing import make_executor
from fastclip.tuner.training.explosion import Verdict

ray = pytest.importorskip("ray", reason="ray is not installed (the extra `ray`)")
cluster_utils = pytest.importorskip("ray.cluster_utils")

optuna.logging.set_verbosity(optuna.logging.WARNING)
SPACE = {"lr": Choice([0.05, 0.1, 0.2, 0.3])}


def tuner(model, space, **options):
    settings = {"sampler": "grid", "cv": 2, "max_epochs": 2, "refit": False, **options}
    return TunerCV(model, space, **settings)


@pytest.fixture(scope="module")
def cluster():
    with pytest.MonkeyPatch.context() as patch:
        here = Path(__file__).parent
        patch.setenv("PYTHONPATH", os.pathsep.join([str(here), str(here.parent)]))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        unused = {"include_dashboard": False, "include_log_monitor": False, "no_monitor": True}
        cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **unused})
        workers = [cluster.add_node(num_cpus=1) for _ in range(2)]
        ray.init(address=cluster.address, log_to_driver=False)
        yield cluster, workers
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture(scope="class")
def pool(cluster):
    executor = make_executor("ray", context(cases.dangerous), n_jobs=2, devices=None)
    yield executor
    executor.close()


class TestExecutor(ExecutorContract):
    lost = "the Ray worker was lost"
    hung = "the Ray worker took no step for"


class TestSearch:
    def test_epochs_come_to_this_process_which_prunes_and_what_a_callback_raises_ends_the_search(
        self, cluster, tmp_path
    ):
        seen = []

        def note(trial, fold, record):
            seen.append((trial.number, fold, record["epoch"]))
            if trial.number == 3:
                raise LookupError("seen enough")

        pruner = optuna.pruners.MedianPruner(n_startup_trials=1, n_warmup_steps=0)
        options = {"executor": "ray", "pruner": pruner, "epoch_callbacks": [note], "output_dir": tmp_path}
        with pytest.raises(LookupError, match="seen enough"):
            tuner(cases.mlp, {"lr": Choice([0.1, 0.2, 1e-7, 0.3])}, **options).fit(cases.blobs())
        whole = [(trial, fold, epoch) for trial in range(2) for fold in range(2) for epoch in (0.0, 1.0)]
        assert seen == [*whole, (2, 0, 0.0), (3, 0, 0.0)]
        study = optuna.load_study(study_name="fastclip", storage=f"sqlite:///{tmp_path}/study.db")
        assert study.trials[2].state is optuna.trial.TrialState.PRUNED

    def test_worker_that_cannot_start_ends_the_search_with_its_reason(self, cluster, tmp_path, monkeypatch):
        (tmp_path / "only_here.py").write_text("from tuner_cases import mlp as f\ndef make(p): return f(p)\n")
        monkeypatch.syspath_prepend(tmp_path)
        import only_here

        with pytest.raises(
            RuntimeError, match=r"(?s)first worker to start failed.*No module named 'only_here'"
        ):
            tuner(only_here.make, SPACE, executor="ray").fit(cases.blobs())

    def test_lost_machine_costs_no_trial(self, cluster, tmp_path):
        """Last of all: it leaves the cluster with one worker."""
        machines, workers = cluster

        def lose_a_machine(study, trial):
            if trial.number == 0:
                machines.remove_node(workers[1], allow_graceful=False)

        (tmp_path / "ray").mkdir()
        space = {**SPACE, "folder": str(tmp_path / "ray")}
        lossy = tuner(cases.pid_model, space, executor="ray", n_jobs=2, callbacks=[lose_a_machine])
        lossy.fit(cases.blobs())
        assert len(list((tmp_path / "ray").iterdir())) == 2  # both trained, and nothing replaced the lost one
        assert {record.status for record in lossy.records_} == {Verdict.OK}
        (tmp_path / "here").mkdir()
        here = tuner(cases.pid_model, {**SPACE, "folder": str(tmp_path / "here")}).fit(cases.blobs())
        scores = [search.cv_results_["mean_test_score"].tolist() for search in (lossy, here)]
        assert scores[0] == scores[1]


def test_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "fastclip.tuner.executors.ray_workers", raising=False)
    with pytest.raises(ImportError, match=r"ray is not installed; expected the extra `ray`"):
        tuner(cases.mlp, SPACE, executor="ray").fit(cases.blobs())
