import shlex
import time

import optuna
import pytest
from programs import start_python
from tuner_cli_cases import TUNE, invoke

from fastclip.tuner.config import build, read_config
from fastclip.tuner.errors import ConfigError
from fastclip.tuner.study.spaces import Choice, Float, Int
from fastclip.tuner.study.storage import open_storage

CONFIG = """
[study]
n_trials = 4
max_epochs = 2

[model]
factory = "tuner_cases:mlp"

[data]
source = "tuner_cases:blobs"
n = 60

[cv]
folds = 2

[space]
lr = { low = 0.01, high = 1.0, log = true }
max_norm = { choices = ["none", 1.0] }
momentum = 0.9
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "study.toml"
    path.write_text(CONFIG)
    return path


class TestConfig:
    def test_sections_become_the_tuner(self, config):
        experiment = build(read_config(config, ["depth.low=1", "depth.high=4", "cv.folds=3", "lr.high=0.5"]))
        tuner = experiment.tuner
        assert tuner.space == {
            "lr": Float(0.01, 0.5, log=True),
            "max_norm": Choice([None, 1.0]),
            "momentum": 0.9,
            "depth": Int(1, 4),
        }
        assert (tuner.n_trials, tuner.cv, tuner.model_init.__name__) == (4, 3, "mlp")
        assert len(experiment.data[1]) == 60

    @pytest.mark.parametrize(
        ("section", "expected"),
        [
            ('splitter = "RouletteWheelSplit"\nwheel = "folds"', "RouletteWheelSplit"),
            (
                'splitter = "TimeSeriesSplit"\nn_splits = 3',
                "TimeSeriesSplit(gap=0, max_train_size=None, n_splits=3",
            ),
            ("test_size = 0.25", "0.25"),
        ],
    )
    def test_splitters(self, config, section, expected):
        config.write_text(CONFIG.replace("folds = 2", section))
        assert repr(build(read_config(config)).tuner.cv).startswith(expected)

    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            ("n_trials", "n_trails", r"'n_trails' is no key of \[study\].* Did you mean n_trials\?"),
            ("[space]", "[spaces]", "'spaces' is no section.* Did you mean space"),
            ("high = 1.0", "high = 0.001", r"space\.lr: Float: low=0\.01 is above high=0\.001"),
            ("low = 0.01", "low = 0.0", r"space\.lr: Float: log=True with low=0\.0"),
            ("low = 0.01,", "", r"space\.lr = .*; expected low and high, or choices"),
            ("log = true", "lgo = true", r"'lgo' is no key of space\.lr"),
            ("[study]", "[study", "is no TOML"),
            ('factory = "tuner_cases:mlp"', "", r"\[model\] factory is missing"),
            ("tuner_cases:mlp", "tuner_cases", "expected 'module:name'"),
            (
                "tuner_cases:mlp",
                "tuner_cases:mpl",
                r"\[model\] factory = 'tuner_cases:mpl' cannot be imported",
            ),
            ("n = 60", "m = 60", r"build: \[data\]: blobs\(\) got an unexpected keyword argument 'm'"),
            ("folds = 2", "folds = 2\ntest_size = 0.1", "both folds and test_size"),
            ("folds = 2", 'splitter = "KFolds"', "splitter = 'KFolds'; expected RouletteWheelSplit or"),
            ("[cv]", "[explosion]\nfactor = 2\n[cv]", r"'factor' is no key of \[explosion\]"),
            (
                "[cv]",
                "[explosion]\nloss_factor = 0.5\n[cv]",
                r"\[explosion\]: ExplosionRule: loss_factor=0\.5",
            ),
        ],
    )
    def test_mistake_is_named(self, config, old, new, message):
        config.write_text(CONFIG.replace(old, new))
        with pytest.raises(ConfigError, match=message):
            build(read_config(config))

    @pytest.mark.parametrize("override", ["lr.high", "=3", "momentum.low=1"])
    def test_wrong_override_is_refused(self, config, override):
        with pytest.raises(ConfigError, match="--set"):
            read_config(config, [override])

    def test_missing_file_is_named(self, tmp_path):
        with pytest.raises(ConfigError, match=r"none\.toml does not exist"):
            read_config(tmp_path / "none.toml")


class TestRun:
    def test_run_writes_everything_and_shows_a_line_per_trial(self, config, tmp_path):
        result = invoke("run", config, "-o", tmp_path / "run")
        assert result.exit_code == 0, result.output
        lines = result.output.splitlines()
        assert [line.split(":")[0] for line in lines[:4]] == [f"trial {i}" for i in range(4)]
        assert "0 exploded, 0 pruned]" in lines[3]
        assert "best parameters: {'lr':" in result.output
        assert {"trials.csv", "best_model.pt", "config.json"} <= {
            p.name for p in (tmp_path / "run").iterdir()
        }

        status = invoke("status", tmp_path / "run")
        assert "4 trials: best" in status.output
        assert "0 running, 0 waiting" in status.output

    def test_used_directory_needs_resume_and_resume_needs_the_same_space(self, config, tmp_path):
        assert invoke("run", config, "-o", tmp_path / "run").exit_code == 0
        used = invoke("run", config, "-o", tmp_path / "run")
        assert used.exit_code == 1
        assert "is not empty" in used.output
        assert "--resume" in used.output
        changes = {"lr.high=0.5": "space", "data.n=61": "data", "cv.folds=3": "cv", "study.seed=1": "seed"}
        for override, name in changes.items():
            changed = invoke("run", config, "-o", tmp_path / "run", "--resume", "--set", override)
            assert changed.exit_code == 1
            assert "cannot resume, changed: " in changed.output
            assert name in changed.output.split("changed: ")[1].split(";")[0]
        more = invoke("run", config, "-o", tmp_path / "run", "--resume", "--set", "study.n_trials=6")
        assert more.exit_code == 0
        assert [line.split(":")[0] for line in more.output.splitlines()[:2]] == ["trial 4", "trial 5"]

        whole = invoke("run", config, "-o", tmp_path / "whole", "--set", "study.n_trials=6")
        assert whole.exit_code == 0
        assert (tmp_path / "run" / "trials.csv").read_bytes() == (
            tmp_path / "whole" / "trials.csv"
        ).read_bytes()

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("study.n_trials=0", "n_trials=0; expected at least 1"),
            ("study.max_epochs=0", "max_epochs=0"),
            ('study.executor="threads"', "executor='threads' is unknown"),
            ("lr.low=2.0", "low=2.0 is above high=1.0"),
        ],
    )
    def test_mistake_ends_it_before_anything_is_written(self, config, tmp_path, override, message):
        result = invoke("run", config, "-o", tmp_path / "run", "--set", override)
        assert result.exit_code == 1
        assert message in result.output
        assert "Traceback" not in result.output
        assert not (tmp_path / "run").exists()

    def test_all_exploded_is_an_error_message(self, config, tmp_path):
        overrides = ("--set", "model.factory=tuner_cases:always_nan", "--set", "batch_size=10")
        result = invoke("run", config, "-o", tmp_path / "run", *overrides)
        assert result.exit_code == 1
        assert "all 4 trials exploded" in result.output

    def test_ctrl_c_says_how_to_go_on(self, config, tmp_path, monkeypatch):
        def interrupt(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr("fastclip.tuner.tuner_cv.TunerCV.fit", interrupt)
        options = ("--n-jobs", 2, "--device", "cpu", "--set", "study.max_epochs=3", "--set", "lr.low=0.1")
        result = invoke("run", config, "-o", tmp_path / "my run", *options)
        assert result.exit_code == 130
        command = shlex.split(result.output.partition("Go on with: ")[2])
        assert command[:3] == ["fastclip", "tune", "run"]
        assert command[3:] == [*map(str, (config, "-o", tmp_path / "my run", *options)), "--resume"]


def test_validate_checks_without_training(config):
    result = invoke("validate", config)
    assert result.exit_code == 0, result.output
    assert "60 samples, 2 folds, 4 trials of at most 2 epochs" in result.output
    assert invoke("validate", config, "--set", "model.factory=tuner_cases:broken").exit_code == 1
    assert "cv=1" in invoke("validate", config, "--set", "cv.folds=1").output


def test_suggest_clip_prints_a_line_for_the_config(config):
    result = invoke("suggest-clip", config, "--lr", "0.1", "--steps", "20")
    assert result.exit_code == 0, result.output
    assert "20 steps at lr=0.1" in result.output
    assert "max_norm = { low = 0." in result.output
    exploded = invoke("suggest-clip", config, "--lr", "1e6", "--set", "model.factory=tuner_cases:mlp")
    assert exploded.exit_code == 1
    assert "exploded at step" in exploded.output


def test_status_of_nothing_is_an_error(tmp_path):
    assert "expected the directory of a study" in invoke("status", tmp_path).output
    assert "either a directory or --storage" in invoke("status").output


class TestWorkers:
    """Workers share a study; SQLite stands in for a server, with two short writers."""

    @pytest.fixture
    def shared(self, config, tmp_path):
        """A study in a shared storage whose search is `run`, and a function that starts another worker."""
        url = f"sqlite:///{tmp_path}/shared.db"
        study = f'n_trials = 6\nstale_after = 5\nname = "shared"\nstorage = "{url}"'
        config.write_text(
            CONFIG.replace("n_trials = 4", study).replace("tuner_cases:mlp", "tuner_cases:slow")
        )
        processes = []

        def start(*arguments):
            processes.append(start_python(tmp_path, TUNE, *arguments))
            return processes[-1]

        yield url, start
        for process in processes:
            process.kill()

    def test_killed_worker_costs_no_trial(self, shared, config, tmp_path):
        url, start = shared
        doomed = start("run", config, "-o", tmp_path / "run")
        deadline = time.monotonic() + 90
        while not (tmp_path / "run" / "trials.csv").exists() or len(self.trials(url)) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        doomed.kill()
        doomed.join()
        running = [trial for trial in self.trials(url) if trial.state == optuna.trial.TrialState.RUNNING]
        survivor = start("worker", "--storage", url, "--study", "shared", "--stale-after", 5)
        survivor.join(180)
        assert survivor.exitcode == 0, (tmp_path / "stderr").read_text()
        trials = self.trials(url)
        finished = [trial for trial in trials if trial.state == optuna.trial.TrialState.COMPLETE]
        assert len(finished) == 6
        abandoned = [trial for trial in trials if trial.state == optuna.trial.TrialState.FAIL]
        # None, if it was killed between two trials.
        assert [trial.number for trial in abandoned] == [trial.number for trial in running]
        copies = [
            trial.params
            for trial in finished
            if trial.system_attrs.get("failed_trial") in {trial.number for trial in abandoned}
        ]
        # A trial that had no parameters yet is drawn again.
        assert all(lost.params in ({}, params) for lost, params in zip(abandoned, copies, strict=True))
        assert "6 trials: best" in invoke("status", "--storage", url, "--study", "shared").output

    @staticmethod
    def trials(url):
        try:
            return optuna.load_study(study_name="shared", storage=open_storage(url)).trials
        except KeyError:
            return []

    def test_unknown_study_is_an_error(self, tmp_path):
        (tmp_path / "none.db").touch()
        result = invoke("worker", "--storage", f"sqlite:///{tmp_path}/none.db", "--study", "nothing")
        assert result.exit_code == 1
        assert "holds no study 'nothing'" in result.output
