"""Open the study of a search: a new one, one to resume, or one that others share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.study import StudyDirection

from fastclip.tuner.errors import ResumeError
from fastclip.tuner.study.output import CONFIG, OutputDir
from fastclip.tuner.study.storage import open_shared_storage, open_storage, study_exists

SETTINGS_ATTR = "fastclip:settings"
CONFIG_ATTR = "fastclip:config"


@dataclass(frozen=True)
class OpenedStudy:
    """A study, its directory if it has one, whether other processes may write it, and whether it is new."""

    study: optuna.Study
    output: OutputDir | None
    is_shared: bool
    is_new: bool


def open_study(
    settings: dict[str, Any],
    *,
    sampler: Any,
    pruner: optuna.pruners.BasePruner | None,
    storage: Any,
    study_name: str,
    stale_after: int,
    output_dir: str | Path | None,
    resume: bool,
    attributes: Mapping[str, Any],
    caller: str,
) -> OpenedStudy:
    """Open or create the study and check that it was made with these settings.

    Raises:
        ResumeError: a used output_dir or study without resume, or other settings.
        ValueError: an Optuna study with several objectives or the wrong direction.
    """
    output = None if output_dir is None else OutputDir(output_dir)
    if output is not None and not resume:
        output.check_unused(caller)
    if isinstance(sampler, optuna.Study):
        study, is_shared = _check_study(sampler, settings, caller), False
        is_new = SETTINGS_ATTR not in study.user_attrs
    else:
        is_shared = isinstance(storage, str)
        if is_shared:
            storage = open_shared_storage(storage, stale_after)
        elif storage is None and output is not None:
            output.path.mkdir(parents=True, exist_ok=True)
            storage = open_storage(output.storage_url)
        is_new = storage is None or not study_exists(storage, study_name)
        if not is_new and not resume:
            raise ResumeError(
                f"{caller}: the storage holds a study {study_name!r}; expected a new name. Continue it with "
                "resume=True (--resume), or choose another study_name."
            )
        study = optuna.create_study(
            storage=storage,
            sampler=sampler if isinstance(sampler, optuna.samplers.BaseSampler) else None,
            pruner=optuna.pruners.NopPruner() if pruner is None else pruner,
            study_name=study_name,
            direction=settings["direction"],
            load_if_exists=resume,
        )
    if is_new:
        for name, value in {**attributes, SETTINGS_ATTR: settings}.items():
            study.set_user_attr(name, value)
    else:
        check_settings(study.user_attrs.get(SETTINGS_ATTR), settings, caller)
    return OpenedStudy(study, output, is_shared, is_new)


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
