"""What the commands of `fastclip tune` print, and how they end."""

import csv
import errno
import io
import json
import re
import time

import numpy as np
import optuna
import pytest
import torch
import tuner_cases as cases
from programs import start_python, wait_for
from report_cases import MadeUpStudy, scored
from rich.console import Console
from tuner_cli_cases import invoke

from fastclip.tuner.cli.tables import show_results
from fastclip.tuner.config import SECTIONS, build, read_config
from fastclip.tuner.errors import ConfigError
from fastclip.tuner.study.output import OutputDir
from fastclip.tuner.study.storage import num_silent, open_shared_storage, open_storage, quiet_optuna
from fastclip.tuner.training.reading import as_data
from fastclip.tuner.training.setting_apart import set_apart

CONFIG = """
[study]
n_trials = 2
max_epochs = 1
sampler = "random"
[model]
factory = "tuner_cases:mlp"
[data]
source = "tuner_cases:blobs"
n = 60
[cv]
folds = 2
[space]
lr = { low = 0.01, high = 0.1 }
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "study.toml"
    path.write_text(CONFIG)
    return path


def test_table_fits_80_columns_with_short_numbers():
    study = MadeUpStudy()
    for i in range(7):
        names = {f"parameter_{k}": 0.1234567890123 * (k + 1) for k in range(6)}
        distributions = dict.fromkeys(names, optuna.distributions.FloatDistribution(0.0, 1.0))
        study.add(scored(0.9 + i / 97), lr=0.0123456789, distributions=distributions, **names)
    text = io.StringIO()
    show_results(Console(file=text, width=80), study.view.records, study.study)
    lines = text.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert "│ 6     │ 0.9619 │ lr=0.01235 parameter_0=0.1235 parameter_1=0.2469" in text.getvalue()
    assert "7 trials: best 0.9619, 0 exploded, 0 pruned" in text.getvalue()
    assert "…" not in text.getvalue()


class TestValidate:
    def test_same_seed_gives_the_same_words(self, config):
        first, again = invoke("validate", config).output, invoke("validate", config).output
        assert first == again
        assert "60 samples, 2 folds, 2 trials of at most 1 epochs; models were built at 18 points" in first
        assert invoke("validate", config, "--set", "study.seed=1").output != first

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ('optimizer.choices=["sgd", "sdg"]', "optimizer='sdg' is unknown; expected a callable or one of"),
            ('scheduler.choices=["none", "cosin"]', "scheduler='cosin' is unknown"),
            ('strategy="MedianMADD"', "strategy='MedianMADD' is unknown; expected one of"),
            ("lr.low=-0.1", "lr=-0.1; expected a number of at least 0"),
            ("l2.choices=[0.1, -1.0]", "l2=-1.0; expected a number of at least 0"),
            ("max_norm=0.0", "max_norm=0.0; expected a number above 0"),
            ('momentum="high"', "momentum='high'; expected a number of at least 0"),
            ("batch_size=0", "batch_size=0; expected a whole number of at least 1"),
            ('init.choices=["default", "kaimin"]', "kaimin"),
            ('amp.choices=["none", "half"]', "amp='half'; expected None or one of bfloat16, float16"),
            ("accumulate=0", "accumulate=0; expected a whole number of at least 1"),
            ('param_groups="tuner_cases:mlp"', "cannot be trained: mlp() takes 1 positional argument"),
            ('param_groups="tuner_cases:no_such"', "[space] param_groups = 'tuner_cases:no_such' cannot"),
            ('amp.choices=["none", "bfloat16", "float16"]', None),
            ("accumulate.choices=[1, 4]", None),
            ("no_decay.choices=[true, false]", None),
            ('param_groups="tuner_cases:one_group"', None),
            ("study.search_clipped=true", None),
            ('optimizer.choices=["sgd", "adam"]', None),
            ('strategy.choices=["none", "MedianMAD"]', None),
        ],
    )
    def test_values_of_the_whole_space(self, config, override, message):
        overrides = ["--set", override, *(["--set", "lr.high=0.1"] if override.startswith("lr") else [])]
        result = invoke("validate", config, *overrides)
        assert result.exit_code == (0 if message is None else 1), result.output
        assert message is None or message in result.output

    def test_upper_end_of_a_range(self, config):
        sets = ("momentum.low=0.0", "momentum.high=2.0", "dropout.low=0.0", "dropout.high=1.5")
        overrides = [word for override in sets for word in ("--set", override)]
        result = invoke("validate", config, *overrides, "--set", "model.factory=tuner_cases:dropping_out")
        assert "rate=1.5; expected a value in [0, 1)" in result.output


class TestNoTraceback:
    @pytest.mark.parametrize(
        ("device", "message"),
        [
            ("cuda:99", "'cuda:99', which is not there; expected one of cpu"),
            ("gpu", "'gpu'; expected the name of a device"),
        ],
    )
    def test_missing_device(self, config, tmp_path, device, message):
        for command in (("run", config, "-o", tmp_path / "run"), ("validate", config)):
            result = invoke(*command, "--device", device)
            assert result.exit_code == 1
            assert message in result.output
        assert not (tmp_path / "run").exists()

    def test_file_in_the_way(self, config, tmp_path):
        (tmp_path / "run").write_text("mine")
        result = invoke("run", config, "-o", tmp_path / "run")
        assert result.exit_code == 1
        assert f"output_dir {tmp_path / 'run'} is a file; expected a new or an empty dir" in result.output
        assert invoke("run", config, "-o", tmp_path / "run", "--resume").exit_code == 1
        assert (tmp_path / "run").read_text() == "mine"

    @pytest.mark.parametrize(
        "error",
        [
            OSError(errno.ENOSPC, "No space left on device"),
            optuna.exceptions.StorageInternalError("No space left on device"),
        ],
    )
    def test_full_disk(self, config, tmp_path, monkeypatch, error):
        def fail(*_, **__):
            raise error

        monkeypatch.setattr("fastclip.tuner.tuner_cv.TunerCV.fit", fail)
        result = invoke("run", config, "-o", tmp_path / "run")
        assert result.exit_code == 1
        assert "No space left on device. Go on with: fastclip tune run" in result.output
        assert result.output.rstrip().endswith("--resume")

    def test_sentence_of_a_missing_file_ends_once(self, tmp_path):
        result = invoke("report", tmp_path)
        assert result.exit_code == 1
        assert result.output.endswith("Give the output directory of a search.\n")


class TestStatus:
    def test_killed_trial_is_told_from_a_running_one(self, config, tmp_path):
        output = OutputDir(tmp_path / "run")
        assert invoke("run", config, "-o", output.path).exit_code == 0
        study = optuna.load_study(study_name="fastclip", storage=open_storage(output.storage_url))
        study.ask()
        with output.search():
            assert "\n1 running, 0 waiting" in invoke("status", output.path).output
            assert "is searched by another process" in invoke(
                "run", config, "-o", output.path, "--resume", "--set", "study.n_trials=3"
            ).output.replace("\n", " ")
        told = invoke("status", output.path).output
        assert "\n0 running, 1 killed (go on with --resume), 0 waiting" in told

    def test_directory_is_let_go_of_when_its_process_is_killed(self, tmp_path):
        code = (
            "import sys, time; from fastclip.tuner.study.output import OutputDir\n"
            "with OutputDir(sys.argv[1]).search(): print('held', flush=True); time.sleep(60)"
        )
        process = start_python(tmp_path, code, tmp_path)
        wait_for(tmp_path / "stdout", "held\n")
        assert OutputDir(tmp_path).is_searched
        process.kill()
        process.join()
        assert not OutputDir(tmp_path).is_searched

    def test_silent_trials_of_a_shared_study_are_counted(self, tmp_path):
        storage = open_shared_storage(f"sqlite:///{tmp_path}/shared.db", stale_after=1)
        study = optuna.create_study(storage=storage)
        with quiet_optuna():
            storage.record_heartbeat(study.ask()._trial_id)
            assert num_silent(study) == 0
            time.sleep(2.1)
            assert num_silent(study) == 1
        assert num_silent(optuna.create_study()) == 0


def test_a_file_that_is_not_there_is_told_and_not_made(tmp_path):
    output = tmp_path / "run"
    OutputDir(output).path.mkdir()
    (output / "config.json").write_text(json.dumps({"run": {"study_name": "fastclip"}}))
    url = f"sqlite:///{tmp_path}/mistyped.db"
    for command in (("status", "--storage", url), ("report", str(output), "--storage", url)):
        result = invoke(*command)
        assert result.exit_code == 1
        assert "mistyped.db does not exist; expected a study's file" in result.output.replace("\n", "")
    assert not (tmp_path / "mistyped.db").exists()


def test_h_is_help_as_in_every_other_command():
    for command in ((), ("run",)):
        assert invoke(*command, "-h").output == invoke(*command, "--help").output != ""


def test_init_writes_a_study_that_is_valid_and_overwrites_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "written to study.toml" in invoke("init").output
    overrides = ("model.factory=tuner_cases:mlp", "data.source=tuner_cases:blobs")
    result = invoke("validate", "study.toml", *(w for o in overrides for w in ("--set", o)))
    assert result.exit_code == 0, result.output
    assert "90 samples, 5 folds, 30 trials of at most 10 epochs" in result.output
    text = (tmp_path / "study.toml").read_text()
    (tmp_path / "full.toml").write_text(re.sub(r"^# (?=\[|\w+ = )", "", text, flags=re.M))
    full = read_config(tmp_path / "full.toml")  # every option in a comment is one that exists
    assert set(full) == set(SECTIONS)
    assert full["test"] == {"size": 0.2}
    of_the_demo = re.sub(r"^(factory|source) = .*\n", "", text, flags=re.M)
    (tmp_path / "demo.toml").write_text(re.sub(r"^#   ", "", of_the_demo, flags=re.M))
    demo = read_config(tmp_path / "demo.toml")
    assert demo["model"] == {"name": "four-conv"}
    assert demo["data"] == {"kind": "imagefolder", "path": "photos", "size": 64, "skip_unreadable": True}
    assert full["study"]["search_clipped"] is True
    assert {"accumulate", "amp", "no_decay", "param_groups"} <= set(full["space"])
    assert full["space"]["batch_size"] == {"choices": [32, 64, 128]}
    assert "study.toml exists; expected the name of a new file" in invoke("init").output
    assert (tmp_path / "study.toml").read_text() == text


def test_jobs_and_devices_come_from_the_command_line(config, tmp_path, monkeypatch):
    seen = []

    def fit(tuner, data):
        seen.append((tuner.n_jobs, tuner.devices))
        raise KeyboardInterrupt

    monkeypatch.setattr("fastclip.tuner.tuner_cv.TunerCV.fit", fit)
    run = ("run", config, "-o", tmp_path / "run", "--set", "study.n_jobs=3")
    invoke(*run)
    invoke(*run, "--n-jobs", 2, "--device", "cpu", "--device", "cuda:1")
    assert seen == [(3, None), (2, ("cpu", "cuda:1"))]


class TestSetApart:
    def test_run_measures_what_no_trial_saw(self, config, tmp_path):
        result = invoke("run", config, "-o", tmp_path / "run", "--set", "test.size=0.2")
        assert result.exit_code == 0, result.output
        assert "on 12 samples set apart: " in result.output
        numbers = r"(train_loss [\d.]+, )?loss [\d.]+, accuracy [\d.]+"
        assert re.search(rf"^trial \d, folds, held-out part: {numbers}", result.output, re.MULTILINE)
        assert "folds, training part" not in result.output
        assert re.search(rf"^refitted model on its training part: {numbers}", result.output, re.MULTILINE)
        assert "refitted model on its holdout" not in result.output
        assert "accuracy" in result.output.split("set apart: ")[1]
        assert "48 samples and 12 set apart" in invoke("validate", config, "--set", "test.size=0.2").output

    def test_run_tells_what_the_training_parts_and_a_holdout_score(self, config, tmp_path):
        sets = ("study.return_train_score=true", "study.refit_on=holdout")
        overrides = [word for override in sets for word in ("--set", override)]
        log = invoke("run", config, "-o", tmp_path / "run", *overrides).output
        with open(tmp_path / "run" / "folds.csv", newline="") as file:
            folds = list(csv.DictReader(file))
        best = re.search(r"trial (\d), folds, training part: loss [\d.]+, accuracy ([\d.]+)", log)
        assert best, log
        scores = [float(row["train_accuracy"]) for row in folds if row["trial"] == best[1]]
        assert float(best[2]) == pytest.approx(sum(scores) / 2, rel=1e-3)
        assert "refitted model on its holdout: loss " in log

    def test_classes_keep_their_shares_and_no_sample_is_in_both(self, config):
        experiment = build(read_config(config, ["test.size=0.2"]))
        assert np.bincount(experiment.test.labels).tolist() == [4, 4, 4]
        rows = torch.cat([experiment.data.inputs, experiment.test.inputs])
        assert len(torch.unique(rows, dim=0)) == 60
        again = build(read_config(config, ["test.size=0.2"]))
        assert torch.equal(experiment.test.inputs, again.test.inputs)

    def test_groups_stay_whole(self):
        data, test = set_apart(as_data(*cases.blobs(60), np.arange(60) // 6, caller="test"), 0.2, seed=0)
        assert (len(data), len(test)) == (48, 12)
        assert not set(data.groups) & set(test.groups)

    def test_source_of_its_own(self, config):
        overrides = ["test.source=tuner_cases:blobs", "test.n=30", "test.seed=7"]
        experiment = build(read_config(config, overrides))
        assert (len(experiment.data[1]), len(experiment.test)) == (60, 30)

    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            (["test.size=1.5"], r"\[test\]: check_cv: cv=1\.5; expected a test share in \(0, 1\)"),
            (["test.share=0.2"], r"'share' is no key of \[test\]"),
            (["test.size=0.2", "study.refit=false"], r"\[test\] with refit=false; expected a refit"),
        ],
    )
    def test_mistake_is_named(self, config, overrides, message):
        with pytest.raises(ConfigError, match=message):
            build(read_config(config, overrides))
