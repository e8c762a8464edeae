"""Measure the tuner on scikit-learn's digits and write benchmarks/results/tuner.json.

    python benchmarks/tuner.py [--json PATH] [--parts overhead jobs searches]

Three parts, about thirteen minutes on two cores:

- overhead: what one fold costs beside the same training loop with nothing around it;
- jobs: how much faster two jobs are than one, start of the workers included;
- searches: the share of exploded trials after the first ten, told as the worst value with a constraint,
  and told as NaN (what an objective that returns its score does), for the same seeds; the share in a random
  search; and the accuracy of the refitted models on a held-out test set.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import statistics
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

import fastclip
from fastclip.bench.environment import environment
from fastclip.bench.results import write_json
from fastclip.demo.models import DigitsCNN
from fastclip.files import plain
from fastclip.tuner import Choice, ExplosionRule, Float, TunerCV, Verdict
from fastclip.tuner.data import TuningData, as_data
from fastclip.tuner.study.preparation import make_context
from fastclip.tuner.study.samplers import sampler_for_trial
from fastclip.tuner.study.spaces import Space
from fastclip.tuner.study.specification import StudySpec
from fastclip.tuner.training.folds import FoldContext, FoldTask, run_fold

SPACE = {
    # Above about 5 the network explodes whatever the threshold; from 0.3 on it may collapse to guessing.
    "lr": Float(0.02, 100.0, log=True),
    "max_norm": Float(0.1, 100.0, log=True),
    "momentum": 0.9,
    "init": Choice(["default", "kaiming_normal", "orthogonal"]),
}
# Cross-entropy starts at about log 10 here; a network that learns does not rise far above where it started.
RULE = ExplosionRule(loss_factor=1.5)
SEEDS = (0, 1, 2)
N_TRIALS = 30
N_STARTUP = 10
FOLDS = 3
EPOCHS = 8
CPU = torch.device("cpu")


def cnn(params: dict[str, Any]) -> nn.Module:
    """Return a fresh digits network."""
    del params
    return DigitsCNN()


def digits() -> tuple[TuningData, TuningData]:
    """Return the digits as training and test data; the split is the same for every seed."""
    X, y = load_digits(return_X_y=True)  # noqa: N806
    data = as_data((X / 16).reshape(-1, 1, 8, 8), y, caller="digits")
    train, test = train_test_split(np.arange(len(y)), test_size=0.25, stratify=y, random_state=0)
    return data.subset(train), data.subset(test)


def context(data: TuningData, seed: int, cv: Any = FOLDS) -> FoldContext:
    """Return what the folds of a search with this seed share."""
    spec = StudySpec(cnn, SPACE, "benchmark", cv=cv, max_epochs=EPOCHS, explosion=RULE, seed=seed)
    return make_context(spec, data)


def measure_overhead(rounds: int = 9) -> dict[str, float]:
    """Time a fold and the bare loop in turn; return the medians and their ratio."""
    data, _ = digits()
    params = {"lr": 0.02, "momentum": 0.9, "max_norm": 1.0}
    shared = context(data, 0, cv=0.3)
    seconds: dict[str, list[float]] = {"fold": [], "bare": []}
    for _ in range(rounds):
        started = time.perf_counter()
        run_fold(shared, FoldTask(0, 0, params), CPU)
        seconds["fold"].append(time.perf_counter() - started)
        started = time.perf_counter()
        bare_loop(data, *shared.splits[0], params)
        seconds["bare"].append(time.perf_counter() - started)
    fold, bare = (statistics.median(values) for values in (seconds["fold"], seconds["bare"]))
    return {"fold_seconds": fold, "bare_seconds": bare, "overhead": fold / bare - 1}


def bare_loop(data: TuningData, train: Any, test: Any, params: dict[str, float]) -> float:
    """Train as a fold does, with nothing around it: no records, no watch, no scorers."""
    torch.manual_seed(0)
    model = cnn({})
    optimizer = torch.optim.SGD(model.parameters(), lr=params["lr"], momentum=params["momentum"])
    order = np.random.default_rng(0)
    accuracy = 0.0
    for _ in range(EPOCHS):
        model.train()
        rows = torch.from_numpy(order.permutation(train))
        for batch in rows.split(32):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(data.inputs[batch]), data.targets[batch])
            loss.backward()
            norm = fastclip.clip_grad_norm_(model.parameters(), params["max_norm"])
            if not math.isfinite(loss.item() + norm.item()):
                raise FloatingPointError
            optimizer.step()
        model.eval()
        with torch.no_grad():
            held_out = torch.from_numpy(test)
            accuracy = (
                (model(data.inputs[held_out]).argmax(1) == data.targets[held_out]).double().mean().item()
            )
    return accuracy


def measure_jobs(rounds: int = 3) -> dict[str, Any]:
    """Time the same search with one job and with two, in turn; return the medians and their ratio."""
    data, _ = digits()
    space = {**SPACE, "lr": Float(0.01, 0.05, log=True)}
    options = {"sampler": "random", "cv": 2, "n_trials": 24, "max_epochs": 15, "explosion": RULE}
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(rounds):
        for n_jobs, found in seconds.items():
            tuner = TunerCV(cnn, space, n_jobs=n_jobs, refit=False, **options)
            started = time.perf_counter()
            tuner.fit(data)
            found.append(time.perf_counter() - started)
    one, two = map(statistics.median, seconds.values())
    speedups = [a / b for a, b in zip(*seconds.values(), strict=True)]
    return {"one_job_seconds": one, "two_jobs_seconds": two, "speedup": one / two, "speedups": speedups}


def search(how: str, seed: int) -> dict[str, Any]:
    """Run one search of 30 trials; `how` is "constraint", "nan" or "random"."""
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    train, test = digits()
    if how == "nan":
        return {"how": how, "seed": seed, "exploded": told_as_nan(train, seed)}
    sampler = "random" if how == "random" else "tpe"
    options = {"cv": FOLDS, "n_trials": N_TRIALS, "max_epochs": EPOCHS, "explosion": RULE, "seed": seed}
    tuner = TunerCV(cnn, SPACE, sampler=sampler, refit=how == "constraint", **options).fit(train)
    row = {"how": how, "seed": seed, "exploded": [r.status is Verdict.EXPLODED for r in tuner.records_]}
    if how == "constraint":
        row |= {
            "best_params": tuner.best_params_,
            "cv_score": tuner.best_score_,
            "test_accuracy": tuner.score(test),
        }
    return row


def told_as_nan(data: TuningData, seed: int) -> list[bool]:
    """Search with the same draws and folds, but let an explosion fail the trial, as NaN does in Optuna."""
    shared = context(data, seed)
    study = optuna.create_study(direction="maximize")
    exploded = []
    for number in range(N_TRIALS):
        study.sampler = sampler_for_trial("tpe", seed, number, 0)
        trial = study.ask()
        params = Space(SPACE).sample(trial)
        scores: list[float] = []
        for fold in range(FOLDS):
            score = run_fold(shared, FoldTask(number, fold, params), CPU).score
            if score is None:
                break
            scores.append(score)
        exploded.append(len(scores) < FOLDS)
        if exploded[-1]:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            study.tell(trial, float(np.mean(scores)))
    return exploded


def measure_searches() -> dict[str, Any]:
    """Run every search, two at a time, each in a process of its own."""
    jobs = [(how, seed) for seed in SEEDS for how in ("constraint", "nan")] + [("random", SEEDS[0])]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        rows = pool.starmap(search, jobs, chunksize=1)
    shares = {
        how: [statistics.mean(row["exploded"][first:]) for row in rows if row["how"] == how]
        for how, first in (("constraint", N_STARTUP), ("nan", N_STARTUP), ("random", 0))
    }
    return {
        "exploded_after_startup_told_with_constraint": shares["constraint"],
        "exploded_after_startup_told_as_nan": shares["nan"],
        "ratio": statistics.mean(shares["constraint"]) / (statistics.mean(shares["nan"]) or math.nan),
        "exploded_in_random_search": shares["random"],
        "test_accuracy": [row["test_accuracy"] for row in rows if row["how"] == "constraint"],
        "rows": rows,
    }


PARTS = {"overhead": measure_overhead, "jobs": measure_jobs, "searches": measure_searches}


def main() -> None:
    """Measure the parts asked for and write them beside those that are there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "tuner.json")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    results = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
    options = {"space": Space(SPACE).describe(), "rule": asdict(RULE), "n_trials": N_TRIALS}
    options |= {"folds": FOLDS, "epochs": EPOCHS, "seeds": SEEDS}
    for name in arguments.parts:
        measured = PARTS[name]()
        results[name] = {"environment": asdict(environment()), "options": options, **measured}
        write_json(arguments.json, plain(results))
        print(name, {key: value for key, value in measured.items() if key != "rows"}, flush=True)


if __name__ == "__main__":
    main()
