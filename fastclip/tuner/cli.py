"""`fastclip tune`: run, join, inspect and check studies from the command line."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import optuna
from rich.console import Console
from rich.table import Table

from fastclip.tuner.config import Experiment, build, read_config
from fastclip.tuner.errors import AllTrialsFailedError, RefitExplodedError, ResumeError, WarmupExplodedError
from fastclip.tuner.executors.base import device_slots
from fastclip.tuner.progress import progress, summary
from fastclip.tuner.study.opening import CONFIG_ATTR, SETTINGS_ATTR
from fastclip.tuner.study.output import STUDY, OutputDir
from fastclip.tuner.study.records import TrialRecord, collect
from fastclip.tuner.study.spaces import DIMENSIONS, Space
from fastclip.tuner.study.storage import STALE_SECONDS, open_shared_storage
from fastclip.tuner.suggest import suggest_clip_range
from fastclip.tuner.training.folds import build_model
from fastclip.tuner.tuner_cv import DEFAULT_STUDY_NAME, TunerCV

EXIT_INTERRUPTED = 130
SHOWN_TRIALS = 5

set_option = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key: lr.high=0.1."
)
config_argument = click.argument("config", type=click.Path(path_type=Path))


@click.group()
def tune() -> None:
    """Find learning rate, threshold and initialisation by cross-validation."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)


@tune.command()
@config_argument
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="Directory for everything."
)
@click.option("--resume", is_flag=True, help="Go on with the study in the directory.")
@set_option
def run(config: Path, output: Path, resume: bool, overrides: tuple[str, ...]) -> None:
    """Search as CONFIG says and train the best parameters on all data."""
    console = Console()
    with _errors(f"Go on with: fastclip tune run {config} -o {output} --resume"):
        experiment = _load(config, overrides, output_dir=output, resume=resume)
        try:
            with progress(console, experiment.tuner.n_trials) as show:
                experiment.tuner.set_params(callbacks=[show]).fit(experiment.data)
        finally:  # a search that was stopped, or in which all exploded, has the more to tell
            _write_report(console, experiment.tuner)
        _show_results(console, experiment.tuner.records_, experiment.tuner.study_)
        console.print(f"best parameters: {experiment.tuner.best_params_}", soft_wrap=True)
        console.print(f"written to {output}", soft_wrap=True)


@tune.command()
@click.option("--storage", required=True, help="Optuna storage URL that `tune run` was given.")
@click.option("--study", "name", default=DEFAULT_STUDY_NAME, show_default=True, help="Name of the study.")
@click.option("--n-jobs", default=1, show_default=True, help="Folds trained at the same time.")
@click.option(
    "--stale-after",
    default=STALE_SECONDS,
    show_default=True,
    help="Seconds of silence after which a trial is taken over.",
)
def worker(storage: str, name: str, n_jobs: int, stale_after: int) -> None:
    """Join a study that `tune run` made in a shared storage, until it is done."""
    with _errors("The study goes on without this worker."):
        study = _load_study(storage, name)
        config = study.user_attrs.get(CONFIG_ATTR)
        if config is None:
            raise ResumeError(
                f"worker: study {name!r} has no configuration; expected one made by `tune run`."
            )
        _search_path(Path.cwd())
        options: dict[str, Any] = {
            "storage": storage,
            "study_name": name,
            "n_jobs": n_jobs,
            "stale_after": stale_after,
        }
        experiment = build(config, resume=True, **options)
        with progress(Console(), experiment.tuner.n_trials) as show:
            experiment.tuner.set_params(callbacks=[show]).search(experiment.data)


@tune.command()
@click.argument("output", required=False, type=click.Path(path_type=Path))
@click.option("--storage", help="Optuna storage URL, instead of a directory.")
@click.option("--study", "name", default=DEFAULT_STUDY_NAME, show_default=True, help="Name of the study.")
def status(output: Path | None, storage: str | None, name: str) -> None:
    """Show how far the study in OUTPUT, or in a storage, has got."""
    with _errors(""):
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
        study = _load_study(str(storage), name)
        states = [trial.state.name.lower() for trial in study.get_trials(deepcopy=False)]
        console = Console()
        _show_results(console, collect(study, study.user_attrs[SETTINGS_ATTR]["n_folds"]), study)
        counts = ", ".join(f"{states.count(state)} {state}" for state in ("running", "waiting"))
        console.print(f"{counts}")


@tune.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="File; default: DIRECTORY/report.html.")
@click.option("--plots", type=click.Path(path_type=Path), help="Write the pictures as PNG into this folder.")
@click.option("--storage", help="Optuna storage URL of the study, when it is not in the directory.")
def report(directory: Path, output: Path | None, plots: Path | None, storage: str | None) -> None:
    """Write what the study in DIRECTORY found as one HTML file, also while it runs."""
    with _errors(""):
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
    with _errors(""):
        experiment = _load(config, overrides)
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
@set_option
def validate(config: Path, overrides: tuple[str, ...]) -> None:
    """Check CONFIG, its data, its splits and its model without training."""
    with _errors(""):
        experiment = _load(config, overrides)
        tuner, data = experiment.tuner, experiment.data
        context = tuner.check(data)
        params = Space(tuner.space).sample(optuna.create_study().ask())
        device = device_slots(tuner.devices, 1)[0]
        build_model(context.model_init, context.data, params, context.splits[0][0], device)
        Console().print(
            f"{config}: {len(context.data)} samples, {len(context.splits)} folds, {tuner.n_trials or 'all'} "
            f"trials of at most {tuner.max_epochs} epochs; a model was built with {params}.",
            soft_wrap=True,
        )


def _search_path(folder: Path) -> None:
    """Let references find modules in a folder, as `python script.py` would."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _load(config: Path, overrides: tuple[str, ...], **options: Any) -> Experiment:
    for folder in (Path.cwd(), config.absolute().parent):
        _search_path(folder)
    table = read_config(config, overrides)
    return build(table, study_attrs={CONFIG_ATTR: table}, **options)


def _write_report(console: Console, tuner: TunerCV) -> None:
    """Write report.html if the search has begun and the extra is there."""
    if not hasattr(tuner, "study_"):
        return
    try:
        console.print(f"report: {tuner.report()}", soft_wrap=True)
    except ImportError as error:
        console.print(f"no report: {error}", soft_wrap=True)


def _load_study(storage: str, name: str) -> optuna.Study:
    try:
        return optuna.load_study(study_name=name, storage=open_shared_storage(storage))
    except KeyError:
        raise ValueError(
            f"tune: {storage} holds no study {name!r}; expected one made by `tune run`."
        ) from None


def _show_results(console: Console, records: list[TrialRecord], study: optuna.Study) -> None:
    """Print the best trials and the counts."""
    sign = 1 if study.direction == optuna.study.StudyDirection.MINIMIZE else -1
    scored = sorted(
        (r for r in records if r.score is not None and r.has_score), key=lambda r: sign * (r.score or 0)
    )
    table = Table("trial", "score", "parameters", title=f"{len(records)} trials: {summary(study)}")
    for record in scored[:SHOWN_TRIALS]:
        chosen = {
            name: value for name, value in record.params.items() if name in record.chosen or name == "lr"
        }
        table.add_row(str(record.number), f"{record.score:.4g}", str(chosen))
    console.print(table)


@contextmanager
def _errors(after_interrupt: str) -> Iterator[None]:
    """Show the tuner's errors without a traceback, and end an interrupted command as a shell expects."""
    try:
        yield
    except KeyboardInterrupt:
        click.echo(f"stopped. {after_interrupt}", err=True)
        sys.exit(EXIT_INTERRUPTED)
    except (
        *(ValueError, TypeError, FileNotFoundError, ImportError),
        *(AllTrialsFailedError, RefitExplodedError, WarmupExplodedError),
    ) as error:
        raise click.ClickException(str(error)) from error
