"""Studies described in TOML.

    [study]                       # arguments of TunerCV, and `name`
    name = "digits"
    n_trials = 30
    max_epochs = 10
    sampler = "tpe"
    seed = 0

    [model]
    factory = "my_package.models:make_cnn"       # function of the parameters -> torch module
                                                 # or name = "four-conv", a network of the demo

    [data]
    source = "sklearn.datasets:load_digits"      # function -> Dataset, (X, y) or (X, y, groups)
    return_X_y = true                            # every other key is an argument of it
                                                 # or kind = "imagefolder", path = "photos", and the like

    [cv]                          # one of: folds = 5, test_size = 0.2, or a splitter and its arguments
    splitter = "StratifiedKFold"
    n_splits = 3

    [test]                        # set apart before the search, measured after it; or a source
    size = 0.2                    # data of a kind brings its own

    [explosion]                   # fields of ExplosionRule
    loss_factor = 3.0

    [space]                       # a range, choices, or a fixed value; "none" stands for None
    lr = { low = 1e-3, high = 1.0, log = true }  # whole bounds make an integer dimension
    max_norm = { choices = ["none", 0.25, 1.0] }
    momentum = 0.9
    param_groups = "my_package.models:groups"    # function of model and parameters -> groups

Splitters are `RouletteWheelSplit` and the classes of sklearn.model_selection. References are `module:name`;
the directory of the file and the working directory are searched too.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import sklearn.model_selection

from fastclip.tuner.errors import ConfigError
from fastclip.tuner.study.kinds import DATA_KINDS, NAMED_MODEL, KindData
from fastclip.tuner.study.references import call, check_names, resolve_reference
from fastclip.tuner.study.spaces import Choice, Float, Int
from fastclip.tuner.study.specification import StudySpec
from fastclip.tuner.training.data import TuningData
from fastclip.tuner.training.explosion import ExplosionRule
from fastclip.tuner.training.reading import as_data
from fastclip.tuner.training.roulette import RouletteWheelSplit
from fastclip.tuner.training.setting_apart import set_apart
from fastclip.tuner.tuner_cv import TunerCV

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# What another section or the command line says, or no file can.
ELSEWHERE = {
    *("model_init", "space", "cv", "explosion", "loss"),
    *("study_name", "output_dir", "resume", "study_attrs", "caller"),
}
STUDY_KEYS = ("name", *(field.name for field in fields(StudySpec) if field.name not in ELSEWHERE))
RANGE_KEYS = ("low", "high", "log", "step")
SECTIONS = ("study", "model", "data", "cv", "test", "explosion", "space")


@dataclass(frozen=True)
class Experiment:
    """A search that is ready to run, its data, and what is set apart to test the best model on.

    Attributes:
        tuner: The search.
        data: What it is for, in any form that `TunerCV.fit` takes.
        test: What is set apart.
        skipped: What data of a kind left out by choice, one sentence each.
    """

    tuner: TunerCV
    data: Any
    test: TuningData | None = None
    skipped: tuple[str, ...] = ()


def read_config(path: str | Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Read a TOML file, apply `section.key=value` or `parameter.key=value`, and check every key.

    Raises:
        ConfigError: the file is missing or no TOML, or a key is unknown.
    """
    try:
        with open(path, "rb") as file:
            config = tomllib.load(file)
    except FileNotFoundError:
        raise ConfigError(f"read_config: {path} does not exist; expected a TOML file.") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"read_config: {path} is no TOML: {error}.") from None
    for override in overrides:
        _override(config, override)
    check_keys(config)
    return config


def check_keys(config: Mapping[str, Any]) -> None:
    """Raise ConfigError for an unknown section or key, or a missing one."""
    check_names("section", config, SECTIONS)
    for section, value in config.items():
        if not isinstance(value, Mapping):
            raise ConfigError(f"check_keys: [{section}] is {value!r}; expected a table.")
    check_names("key of [study]", config.get("study", {}), STUDY_KEYS)
    check_names("key of [model]", config.get("model", {}), ("factory", "name"))
    check_names(
        "key of [explosion]", config.get("explosion", {}), [field.name for field in fields(ExplosionRule)]
    )
    for section, key, word in (("model", "factory", "name"), ("data", "source", "kind")):
        given = [name for name in (key, word) if name in config.get(section, {})]
        if len(given) != 1:
            found = f"has both {key} and {word}" if given else f"{key} is missing"
            raise ConfigError(
                f"check_keys: [{section}] {found}; expected a reference 'module:name', or a {word}: see "
                "docs/tuning.md."
            )
    if not config.get("space"):
        raise ConfigError("check_keys: [space] is missing or empty; expected at least one parameter.")


def build(
    config: Mapping[str, Any], *, output_dir: str | Path | None = None, resume: bool = False, **options: Any
) -> Experiment:
    """Turn a configuration into a `TunerCV` and its data.

    Args:
        config: What `read_config` returned.
        output_dir: As in `TunerCV`.
        resume: As in `TunerCV`.
        options: Further arguments of `TunerCV`, which take precedence.

    Raises:
        ConfigError: a reference cannot be imported, or a value does not fit; the message names the key.
    """
    study = dict(config.get("study", {}))
    if "name" in study:
        study["study_name"] = study.pop("name")
    rule = call("[explosion]", ExplosionRule, config.get("explosion", {}))
    given = _read_data(config["data"])
    data = given.train
    tuner = TunerCV(
        _model_init(config["model"], data),
        {name: _entry(name, value) for name, value in config["space"].items()},
        **{
            **study,
            "cv": _splitter(config.get("cv", {})),
            "explosion": rule,
            "output_dir": output_dir,
            "resume": resume,
            **options,
        },
    )
    if "test" not in config:
        test = as_data(given.test, caller="[data]") if given.test is not None and tuner.refit else None
        return Experiment(tuner, data, test, given.skipped)
    if not tuner.refit:
        raise ConfigError("build: [test] with refit=false; expected a refit, whose model is tested.")
    section = config["test"]
    if "source" in section:
        return Experiment(tuner, data, as_data(_source("test", section), caller="[test]"), given.skipped)
    check_names("key of [test]", section, ("size", "source"))
    if "size" not in section:
        raise ConfigError("build: [test] is empty; expected size = 0.2, or a source.")
    view = as_data(data, caller="[data]")
    share = {"share": float(section["size"]), "seed": tuner.seed}
    data, test = call("[test]", set_apart, {"data": view, **share})
    return Experiment(tuner, data, test, given.skipped)


def _read_data(table: Mapping[str, Any]) -> KindData:
    """Call the source, or the reader of the kind, with the other keys."""
    if "kind" not in table:
        return KindData(_source("data", table), None)
    arguments = dict(table)
    kind = arguments.pop("kind")
    check_names("kind of [data]", [kind], tuple(DATA_KINDS))
    read = resolve_reference("[data] kind", DATA_KINDS[kind])
    check_names(f"key of [data] with kind = {kind!r}", arguments, tuple(inspect.signature(read).parameters))
    given: KindData = call("[data]", read, arguments)
    return given


def _model_init(table: Mapping[str, Any], data: Any) -> Any:
    if "factory" in table:
        return resolve_reference("[model] factory", table["factory"])
    make = resolve_reference("[model] name", NAMED_MODEL)
    return call("[model]", make, {"name": table["name"], "data": data})


def _source(section: str, table: Mapping[str, Any]) -> Any:
    """Call the source of a section with the other keys."""
    arguments = dict(table)
    source = resolve_reference(f"[{section}] source", arguments.pop("source"))
    return call(f"[{section}]", source, arguments)


def _override(config: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        raise ConfigError(f"read_config: --set {override!r}; expected key=value, such as lr.high=0.1.")
    if parts[0] not in SECTIONS:
        parts = ["space", *parts]
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    table = config
    for part in parts[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise ConfigError(
                f"read_config: --set {override!r}: {part} is {table!r}; expected a table to set a key of."
            )
    table[parts[-1]] = value


def _entry(name: str, value: Any) -> Any:
    """Return a dimension or a fixed value of the space."""
    if name == "param_groups":
        return resolve_reference("[space] param_groups", value)
    if not isinstance(value, Mapping):
        return _none(value)
    if "choices" in value:
        check_names(f"key of space.{name}", value, ("choices",))
        return call(f"space.{name}", Choice, {"options": [_none(option) for option in value["choices"]]})
    check_names(f"key of space.{name}", value, RANGE_KEYS)
    if "low" not in value or "high" not in value:
        raise ConfigError(f"build: space.{name} = {dict(value)}; expected low and high, or choices.")
    is_whole = isinstance(value["low"], int) and isinstance(value["high"], int)
    return call(f"space.{name}", Int if is_whole else Float, value)


def _none(value: Any) -> Any:
    return None if value == "none" else value


def _splitter(section: Mapping[str, Any]) -> Any:
    if not section:
        return 5
    if "splitter" not in section:
        check_names("key of [cv]", section, ("folds", "test_size", "splitter"))
        if len(section) != 1:
            raise ConfigError("build: [cv] has both folds and test_size; expected one of them.")
        return next(iter(section.values()))
    arguments = {name: value for name, value in section.items() if name != "splitter"}
    name = section["splitter"]
    kind = (
        RouletteWheelSplit
        if name == RouletteWheelSplit.__name__
        else getattr(sklearn.model_selection, name, None)
    )
    if not (inspect.isclass(kind) and hasattr(kind, "split")):
        raise ConfigError(
            f"build: [cv] splitter = {name!r}; expected RouletteWheelSplit or a splitter of "
            "sklearn.model_selection."
        )
    return call("[cv]", kind, arguments)
