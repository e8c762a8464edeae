"""What a search writes, and that it can be read again."""

import json
import math
import os
from pathlib import Path

import numpy as np
import optuna
import pytest
import torch
import tuner_cases as cases
from tuner_cases import tuner

from fastclip.tuner import Float
from fastclip.tuner.study.output import OutputDir
from fastclip.tuner.study.storage import open_storage

optuna.logging.set_verbosity(optuna.logging.WARNING)


def test_same_seed_gives_identical_tables(tmp_path):
    tables = []
    for name in ("a", "b"):
        space = {"lr": Float(0.01, 1.0, log=True), "max_norm": Float(0.1, 10.0, log=True)}
        tuner(cases.nan_above_half, space, n_trials=14, output_dir=tmp_path / name).fit(cases.blobs())
        tables.append((tmp_path / name / "trials.csv").read_bytes())
    assert tables[0] == tables[1]
    assert tables[0].count(b"\n") == 15
    assert b"exploded,-inf" in tables[0]


def test_directory_holds_everything(tmp_path):
    search = tuner(output_dir=tmp_path / "run").fit(cases.blobs())
    out = OutputDir(tmp_path / "run")
    names = {path.name for path in out.path.iterdir()}
    assert names == {
        "config.json",
        "study.db",
        "splits.npz",
        "trials.csv",
        "folds.csv",
        "history",
        "best_model.pt",
        ".searched",
    }
    for (train, test), (train_read, test_read) in zip(search.splits_, out.read_splits(), strict=True):
        assert (train == train_read).all()
        assert (test == test_read).all()
    assert out.read_config()["settings"]["space"]["lr"] == {
        "type": "Float", "low": 0.01, "high": 1.0, "log": True, "step": None,
    }  # fmt: skip
    history = out.read_history(0, 1)
    assert len(history["history"]) == 3
    assert sum(history["norm_counts"].values()) == search.records_[0].folds[1].steps
    best = torch.load(out.path / "best_model.pt")
    assert best["score"] == search.best_score_
    model = cases.mlp(best["params"])
    model.load_state_dict(best["state_dict"])
    X, _ = cases.blobs()  # noqa: N806
    assert torch.equal(model(X), search.outputs(X))


def test_everything_goes_to_one_directory_wherever_the_process_moves_to(tmp_path, monkeypatch):
    for name in ("before", "after"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "before")
    moving = [lambda study, trial: os.chdir(tmp_path / "after")]
    search = tuner(output_dir="run", n_trials=2, callbacks=moving).fit(cases.blobs())
    assert list((tmp_path / "after").iterdir()) == []
    assert len(list((tmp_path / "before" / "run" / "history").iterdir())) == 4
    assert search.report() == tmp_path / "before" / "run" / "report.html"


def test_study_can_be_read_by_optuna_alone(tmp_path):
    search = tuner(output_dir=tmp_path).fit(cases.blobs())
    storage = optuna.storages.RDBStorage(f"sqlite:///{tmp_path}/study.db")
    assert optuna.load_study(study_name="fastclip", storage=storage).best_value == search.best_score_
    storage.remove_session()
    storage.engine.dispose()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_the_study_is_open_only_while_it_is_read_or_written(tmp_path):
    search = tuner(output_dir=tmp_path).fit(cases.blobs())
    assert search.study_.best_value == search.best_score_
    opened = {os.path.realpath(file) for file in Path("/proc/self/fd").iterdir()}
    assert str(tmp_path / "study.db") not in opened


def test_a_study_in_memory_lives_as_long_as_its_storage():
    storage = open_storage("sqlite:///:memory:")
    optuna.create_study(storage=storage, study_name="kept")
    assert optuna.get_all_study_names(storage) == ["kept"]


def test_nan_weights_are_never_written_as_the_best(tmp_path):
    model = cases.mlp({})
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"0\.weight has non-finite values"):
        OutputDir(tmp_path).write_best(model, {}, 1.0)
    assert list(tmp_path.iterdir()) == []


def test_interrupted_write_leaves_the_old_file(tmp_path):
    from fastclip.files import atomic

    path = tmp_path / "table.csv"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic(path) as file:  # noqa: PT012
        file.write(b"half of the n")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with atomic(path) as file:
        file.write(b"new")
    (tmp_path / "ordinary").touch()
    assert path.stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_json_is_standard_also_for_infinities(tmp_path):
    from fastclip.files import write_json

    write_json(tmp_path / "x.json", {"a": math.inf, "b": [np.float64("nan")], "c": np.int64(3)})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": "inf", "b": ["nan"], "c": 3}
