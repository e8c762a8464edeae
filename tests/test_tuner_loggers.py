"""What the loggers for TensorBoard and MLflow write of a search."""

from __future__ import annotations

import importlib
import re
import sys
import warnings
from pathlib import Path

import optuna
import pytest
import tuner_cases as cases

from fastclip.tuner import Choice, TunerCV
from fastclip.tuner.loggers import MLflowLogger, TensorBoardLogger

optuna.logging.set_verbosity(optuna.logging.WARNING)
DOCS = Path(__file__).parent.parent / "docs" / "tuning.md"
SPACE = {"lr": Choice([0.1, 0.9]), "batch_size": Choice([16])}


def search(logger, **options):
    """Two trials: one that learns, and one that explodes in its second epoch."""
    settings = {"sampler": "grid", "n_trials": None, "refit": False, **options}
    return cases.tuner(
        cases.nan_above_half,
        SPACE,
        callbacks=[logger.on_trial],
        epoch_callbacks=[logger.on_epoch],
        **settings,
    ).fit(cases.blobs())


class TestTensorBoard:
    @pytest.fixture
    def read(self, tmp_path):
        loading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

        def read(run):
            accumulator = loading.EventAccumulator(str(tmp_path / run))
            accumulator.Reload()
            return accumulator

        return read

    def test_has_the_curves_of_folds_and_the_outcome_of_trials(self, read, tmp_path):
        logger = TensorBoardLogger(tmp_path)
        found = search(logger)
        for fold in range(2):
            run = read(f"trial-0/fold-{fold}")
            epochs = [(event.step, event.value) for event in run.Scalars("accuracy")]
            assert [step for step, _ in epochs] == [0, 1, 2]
            assert epochs[-1][1] == pytest.approx(found.records_[0].folds[fold].metrics["accuracy"])
            assert {"train_loss", "grad_norm_median", "lr", "loss"} <= set(run.Tags()["scalars"])
        assert [event.step for event in read("trial-1/fold-0").Scalars("train_loss")] == [0]
        assert read("trial-0").Scalars("score")[0].value == pytest.approx(found.records_[0].score)
        assert "score" not in read("trial-1").Tags()["scalars"]
        plugins = read("trial-1").SummaryMetadata("_hparams_/session_start_info").plugin_data.content
        assert b"exploded" in plugins
        assert logger._writers == {}

    def test_a_fold_that_is_trained_again_replaces_what_was(self, read, tmp_path, monkeypatch):
        files = importlib.import_module("tensorboard.summary.writer.event_file_writer")
        monkeypatch.setattr(files, "_global_uid", files.AtomicCounter(9))  # "10" comes before "9" in a folder
        logger, trial = TensorBoardLogger(tmp_path), optuna.create_study().ask()
        for epoch, loss in ((0, 3.0), (1, 2.0), (0, 1.5), (1, 1.0)):
            logger.on_epoch(trial, 0, {"epoch": float(epoch), "loss": loss})
        logger.close()
        assert [event.value for event in read("trial-0/fold-0").Scalars("loss")] == [1.5, 1.0]

    def test_missing_extra_is_named(self, monkeypatch, tmp_path):
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
        with pytest.raises(ImportError, match=r"pip install 'fastclip\[tensorboard\]'"):
            TensorBoardLogger(tmp_path)


class TestMLflow:
    @pytest.fixture(scope="class")
    def client(self, tmp_path_factory):
        """Of one database for all tests: MLflow takes two seconds to make one."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed (the extra `mlflow`)")
        uri = f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"
        return mlflow.MlflowClient(uri), uri

    @pytest.mark.filterwarnings("ignore")  # of MLflow's own libraries
    def test_has_a_run_per_trial_with_the_curves_of_its_folds(self, client):
        client, uri = client
        found = search(MLflowLogger("digits", uri))
        (experiment,) = [e for e in client.search_experiments() if e.name == "digits"]
        runs = sorted(client.search_runs([experiment.experiment_id]), key=lambda run: run.info.run_name)
        assert [run.info.run_name for run in runs] == ["fastclip trial 0", "fastclip trial 1"]
        learned, exploded = runs
        assert learned.data.params == {"lr": "0.1", "batch_size": "16"}
        assert learned.data.metrics["score"] == found.records_[0].score
        assert [run.data.tags["status"] for run in runs] == ["ok", "exploded"]
        assert [run.info.status for run in runs] == ["FINISHED", "FAILED"]
        assert "score" not in exploded.data.metrics
        history = client.get_metric_history(learned.info.run_id, "fold1/accuracy")
        assert [metric.step for metric in history] == [0, 1, 2]
        assert history[-1].value == found.records_[0].folds[1].metrics["accuracy"]

    @pytest.mark.filterwarnings("ignore")
    def test_another_logger_goes_on_with_the_run_of_a_trial(self, client):
        client, uri = client
        trial = optuna.create_study(study_name="s").ask()
        for epoch in range(2):  # a logger each, as after a resume
            MLflowLogger("resumed", uri).on_epoch(trial, 0, {"epoch": float(epoch), "loss": 1.0 - epoch})
        (run,) = client.search_runs([client.get_experiment_by_name("resumed").experiment_id])
        assert [m.value for m in client.get_metric_history(run.info.run_id, "fold0/loss")] == [1.0, 0.0]

    def test_missing_extra_is_named(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "mlflow", None)
        with pytest.raises(ImportError, match=r"pip install 'fastclip\[mlflow\]'"):
            MLflowLogger("digits")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "written"), [("TensorBoard", "runs/board/trial-1"), ("MLflow", "mlflow.db")]
)
def test_the_lines_of_the_guide_write_what_they_say(name, written, tmp_path, monkeypatch):
    pytest.importorskip(name.lower())
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(rf"```py\n(from \S+ import {name}Logger.*?)```", DOCS.read_text(), re.DOTALL)
    names = {"TunerCV": TunerCV, "make_model": cases.mlp, "space": cases.SPACE}
    exec(block, names)
    names["tuner"].fit(cases.blobs())
    assert (tmp_path / written).exists()
