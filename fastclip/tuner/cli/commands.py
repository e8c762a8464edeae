"""The commands of `fastclip tune`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click
import optuna
from rich.console import Console
from rich.table import Table

from fastclip.tuner.cli.loading import given, load, load_study, search_path
from fastclip.tuner.cli.messages import errors
from fastclip.tuner.cli.starting import write_study
from fastclip.tuner.cli.tables import (
    show_measures,
    show_progress,
    show_refit,
    show_results,
    show_skipped,
)
from fastclip.tuner.config import build
from fastclip.tuner.errors import ResumeError
from fastclip.tuner.progress import progress
from fastclip.tuner.study.opening import CONFIG_ATTR, SETTINGS_ATTR
from fastclip.tuner.study.output import STUDY, OutputDir
from fastclip.tuner.study.records import collect
from fastclip.tuner.study.spaces import DIMENSIONS, Space
from fastclip.tuner.study.specification import DEFAULT_STUDY_NAME
from fastclip.tuner.study.storage import STALE_SECONDS
from fastclip.tuner.study.values import check_values
from fastclip.tuner.suggest import suggest_clip_range
from fastclip.tuner.tuner_cv import TunerCV

set_option = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key: lr.high=0.1."
)
n_jobs_option = click.option("--n-jobs", type=int, help="Folds trained at the same time; -1: every core.")
device_option = click.option(
    "--device", "devices", multiple=True, help="Where to train, such as cpu or cuda:1; may be repeated."
)
config_argument = click.argument("config", type=click.Path(path_type=Path))


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def tune() -> None:
    """Find learning rate, threshold and initialisation by cross-validation."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)


@tune.command()
@config_argument
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="Directory for everything."
)
@click.option("--resume", is_flag=True, help="Go on with the study in the directory.")
@n_jobs_option
@device_option
@set_option
def run(
    config: Path,
    output: Path,
    resume: bool,
    n_jobs: int | None,
    devices: tuple[str, ...],
    overrides: tuple[str, ...],
) -> None:
    """Search as CONFIG says and train the best parameters on all data."""
    console = Console()
    options = {"--n-jobs": () if n_jobs is None else (n_jobs,), "--device": devices, "--set": overrides}
    given_again = [word for name, values in options.items() for value in values for word in (name, value)]
    command = shlex.join(
        map(str, ("fastclip", "tune", "run", config, "-o", output, *given_again, "--resume"))
    )
    with errors(f"Go on with: {command}"):
        experiment = load(
            config, overrides, output_dir=output, resume=resume, n_jobs=n_jobs, devices=devices or None
        )
        show_skipped(console, experiment.skipped)
        try:
            with progress(console, experiment.tuner.n_trials) as show:
                experiment.tuner.set_params(callbacks=[show]).fit(experiment.data)
        finally:  # a search that was stopped, or in which all exploded, has the more to tell
            _write_report(console, experiment.tuner)
        show_results(console, experiment.tuner.records_, experiment.tuner.study_)
        console.print(f"best parameters: {experiment.tuner.best_params_}", soft_wrap=True)
        if experiment.tuner.refit:
            show_refit(console, experiment.tuner.refit_scores_)
        if experiment.test is not None:
            measures = experiment.tuner.measures(experiment.test)
            words = f"on {len(experiment.test)} samples set apart: {show_measures(measures)}"
            console.print(words, soft_wrap=True)
        console.print(f"written to {output}", soft_wrap=True)


@tune.command()
@click.option("--storage", required=True, help="Optuna storage URL that `tune run` was given.")
@click.option("--study", "name", default=DEFAULT_STUDY_NAME, show_default=True, help="Name of the study.")
@n_jobs_option
@device_option
@click.option(
    "--stale-after",
    default=STALE_SECONDS,
    show_default=True,
    help="Seconds of silence after which a trial is taken over.",
)
def worker(storage: str, name: str, n_jobs: int | None, devices: tuple[str, ...], stale_after: int) -> None:
    """Join a study that `tune run` made in a shared storage, until it is done."""
    with errors("The study goes on without this worker."):
        study = load_study(storage, name)
        config = study.user_attrs.get(CONFIG_ATTR)
        if config is None:
            raise ResumeError(
                f"worker: study {name!r} has no configuration; expected one made by `tune run`."
            )
        search_path(Path.cwd())
        options: dict[str, Any] = {
            "storage": storage,
            "study_name": name,
            "n_jobs": n_jobs or 1,
            "devices": devices or None,
            "stale_after": stale_after,
        }
        experiment = build(config, resume=True, **given(options))
        with progress(Console(), experiment.tuner.n_trials) as show:
            experiment.tuner.set_params(callbacks=[show]).search(experiment.data)


@tune.command()
@click.argument("output", required=False, type=click.Path(path_type=Path))
@click.option("--storage", help="Optuna storage URL, instead of a directory.")
@click.option("--study", "name", default=DEFAULT_STUDY_NAME, show_default=True, help="Name of the study.")
def status(output: Path | None, storage: str | None, name: str) -> None:
    """Show how far the study in OUTPUT, or in a storage, has got."""
    with errors(""):
        if (output is None) == (storage is None):
            raise ValueError("status: expected either a directory or --storage.")
        if output is not None:
            if not (output / STUDY).exists():
                raise ValueError(
                    f"status: {output / STUDY} does not exist; expected the directory of a study."
                )
            storage, name = (
                OutputDir(output).storage_url,
                OutputDir(output).read_config()["run"]["study_name"],
            )
        study = load_study(str(storage), name)
        console = Console()
        show_results(console, collect(study, study.user_attrs[SETTINGS_ATTR]["n_folds"]), study)
        show_progress(console, study, None if output is None else OutputDir(output))


@tune.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="File; default: DIRECTORY/report.html.")
@click.option("--plots", type=click.Path(path_type=Path), help="Write the pictures as PNG into this folder.")
@click.option("--storage", help="Optuna storage URL of the study, when it is not in the directory.")
def report(directory: Path, output: Path | None, plots: Path | None, storage: str | None) -> None:
    """Write what the study in DIRECTORY found as one HTML file, also while it runs."""
    with errors(""):
        from fastclip.tuner.report import StudyView, write_plots, write_report

        view = StudyView.open(directory, storage)
        console = Console()
        written = write_report(view, output or OutputDir(directory).report_path)
        console.print(f"written to {written}", soft_wrap=True)
        if plots is not None:
            console.print(f"{len(write_plots(view, plots))} pictures in {plots}", soft_wrap=True)


@tune.command("suggest-clip")
@config_argument
@click.option("--lr", type=float, help="Rate of the warm-up; default: that of CONFIG if it is fixed.")
@click.option("--steps", default=200, show_default=True, help="Steps of the warm-up.")
@set_option
def suggest_clip(config: Path, lr: float | None, steps: int, overrides: tuple[str, ...]) -> None:
    """Suggest a threshold from the gradient norms of a short unclipped warm-up."""
    with errors(""):
        experiment = load(config, overrides)
        tuner, data = experiment.tuner, experiment.data
        fixed = {k: v for k, v in Space(tuner.space).entries.items() if not isinstance(v, DIMENSIONS)}
        fixed.pop("lr_x_max_norm", None)
        params = {**fixed, **({} if lr is None else {"lr": lr})}
        found = suggest_clip_range(tuner.model_init, data, params=params, steps=steps, seed=tuner.seed)
        console = Console()
        table = Table("quantile", "gradient norm", title=f"{found.steps} steps at lr={found.lr:g}")
        for quantile, norm in found.quantiles.items():
            table.add_row(f"{quantile:.0%}", f"{norm:.4g}")
        console.print(table)
        console.print(f"max_norm = {found.max_norm:.4g}")
        console.print(
            f"max_norm = {{ low = {found.low:.4g}, high = {found.high:.4g}, log = true }}  # to search"
        )


@tune.command()
@config_argument
@device_option
@set_option
def validate(config: Path, devices: tuple[str, ...], overrides: tuple[str, ...]) -> None:
    """Check CONFIG, its data, its splits, and its model over its whole space, without training."""
    with errors(""):
        experiment = load(config, overrides, devices=devices or None)
        tuner, data = experiment.tuner, experiment.data
        context = tuner.check(data)
        space = Space(tuner.space)
        count = check_values(context, space)
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=tuner.seed))
        tested = "" if experiment.test is None else f" and {len(experiment.test)} set apart"
        Console().print(
            f"{config}: {len(context.data)} samples{tested}, {len(context.splits)} folds, "
            f"{tuner.n_trials or 'all'} trials of at most {tuner.max_epochs} epochs; models were built at "
            f"{count} points of the space, such as {space.sample(study.ask())}.",
            soft_wrap=True,
        )
        show_skipped(Console(), experiment.skipped)


@tune.command()
@click.argument("file", default="study.toml", type=click.Path(path_type=Path))
def init(file: Path) -> None:
    """Write a commented study to FILE, to be filled in."""
    with errors(""):
        write_study(file)
        Console().print(f"written to {file}; fill it in, then: fastclip tune validate {file}", soft_wrap=True)


def _write_report(console: Console, tuner: TunerCV) -> None:
    """Write report.html if the search has begun and the extra is there."""
    if not hasattr(tuner, "study_"):
        return
    try:
        console.print(f"report: {tuner.report()}", soft_wrap=True)
    except ImportError as error:
        console.print(f"no report: {error}", soft_wrap=True)
