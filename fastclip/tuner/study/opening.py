"""Open the study of a search: a new one, one to resume, or one that others share."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.study import StudyDirection

from fastclip.tuner.errors import ResumeError
from fastclip.tuner.study.output import CONFIG, OutputDir
from fastclip.tuner.study.preparation import settings_of
from fastclip.tuner.study.samplers import make_pruner
from fastclip.tuner.study.specification import StudySpec
from fastclip.tuner.study.storage import open_shared_storage, open_storage, study_exists
from fastclip.tuner.training.folds import FoldContext

SETTINGS_ATTR = "fastclip:settings"
CONFIG_ATTR = "fastclip:config"
RUN_SETTINGS = ("refit_on", "n_trials", "timeout", "n_jobs", "executor", "devices")  # may change


@dataclass(frozen=True)
class OpenedStudy:
    """A study that is ready to be searched in.

    Attributes:
        study: The Optuna study.
        output: Its directory, or None.
        is_shared: Other processes may write it, too.
        salt: Number of this process among those that share it, so that they draw different trials.
    """

    study: optuna.Study
    output: OutputDir | None = None
    is_shared: bool = False
    salt: int = 0


def open_study(spec: StudySpec, context: FoldContext) -> OpenedStudy:
    """Open or create the study, check that it was made with the same settings, and write them down.

    Raises:
        ResumeError: a used output_dir or study without resume, or other settings.
        ValueError: an Optuna study with several objectives or the wrong direction.
    """
    settings = settings_of(context, spec)
    caller, sampler, storage, resume = spec.caller, spec.sampler, spec.storage, spec.resume
    # Absolute, because a callback or a notebook may change the working directory before all is written.
    output = None if spec.output_dir is None else OutputDir(Path(spec.output_dir).absolute())
    if output is not None and not resume:
        output.check_unused(caller)
    if isinstance(sampler, optuna.Study):
        study, is_shared = _check_study(sampler, settings, caller), False
        is_new = SETTINGS_ATTR not in study.user_attrs
    else:
        is_shared = isinstance(storage, str)
        if is_shared:
            storage = open_shared_storage(storage, spec.stale_after)
        elif storage is None and output is not None:
            output.path.mkdir(parents=True, exist_ok=True)
            storage = open_storage(output.storage_url)
        is_new = storage is None or not study_exists(storage, spec.study_name)
        if not is_new and not resume:
            raise ResumeError(
                f"{caller}: the storage holds a study {spec.study_name!r}; expected a new name. Continue it "
                "with resume=True (--resume), or choose another study_name."
            )
        study = optuna.create_study(
            storage=storage,
            sampler=sampler if isinstance(sampler, optuna.samplers.BaseSampler) else None,
            pruner=make_pruner(spec.pruner) or optuna.pruners.NopPruner(),
            study_name=spec.study_name,
            direction=settings["direction"],
            load_if_exists=resume,
        )
    if is_new:
        for name, value in {**(spec.study_attrs or {}), SETTINGS_ATTR: settings}.items():
            study.set_user_attr(name, value)
    else:
        check_settings(study.user_attrs.get(SETTINGS_ATTR), settings, caller)
    if output is not None:
        run = {name: getattr(spec, name) for name in RUN_SETTINGS}
        output.write_config(settings, {**run, "study_name": study.study_name})
        output.write_splits(context.splits)
    return OpenedStudy(study, output, is_shared, 0 if is_new else secrets.randbits(32) * is_shared)


def check_settings(stored: dict[str, Any] | None, settings: dict[str, Any], caller: str) -> None:
    """Raise ResumeError naming every setting that differs from those a study was made with."""
    if stored is None:
        raise ResumeError(
            f"{caller}: the study was not made by fastclip; expected one whose settings are known."
        )
    changed = [name for name in settings if stored.get(name) != settings[name]]
    if changed:
        details = "; ".join(f"{name}: was {stored.get(name)}, is {settings[name]}" for name in changed)
        raise ResumeError(
            f"{caller}: cannot resume, changed: {', '.join(changed)}; expected the settings of the study. "
            f"{details}. Start a new study for them (the old ones are in {CONFIG})."
        )


def _check_study(study: optuna.Study, settings: dict[str, Any], caller: str) -> optuna.Study:
    wanted = StudyDirection[settings["direction"].upper()]
    if study.directions != [wanted]:
        raise ValueError(
            f"{caller}: the study's directions are {[d.name.lower() for d in study.directions]}; expected "
            f"{settings['direction']}, the direction of {settings['primary']}."
        )
    return study
