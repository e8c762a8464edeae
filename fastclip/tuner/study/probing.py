"""Try model_init before anything is trained: what it reads, and whether each model is a new one."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import optuna
import torch
from optuna.trial import FixedTrial
from torch import nn

from fastclip.tuner.study.spaces import Choice, Space
from fastclip.tuner.study.specification import StudySpec
from fastclip.tuner.study.storage import quiet_logging
from fastclip.tuner.training.folds import FoldContext, ModelInit
from fastclip.tuner.training.losses import has_label_parameters
from fastclip.tuner.training.parameters import KNOWN, SOMETIMES_READ, RecordingDict, read_by_loop
from fastclip.tuner.training.seeding import seeded

UNSHARED = 2  # references to an object that one variable holds: the variable and the question
RANDOM_DRAWS = 16
ALIASES = {
    **{"learning_rate": "lr", "eta": "lr", "wd": "weight_decay", "epochs": "max_epochs of the search"},
    **dict.fromkeys(("max_grad_norm", "clip_norm", "grad_clip", "clip", "threshold"), "max_norm"),
}
CPU = torch.device("cpu")


def probe(
    model_init: ModelInit,
    space: Space,
    *,
    seed: int,
    label_parameters_act: bool,
    caller: str,
    may_rest: frozenset[str] = frozenset(),
) -> str:
    """Build models from points of the space until every parameter was read, and describe the first.

    A model_init that raises is left to the first fold, which reports what happened.

    Args:
        model_init: The user's function.
        space: What a trial may choose.
        seed: Seed of the points, and of torch while model_init is called.
        label_parameters_act: Whether `label_smoothing` and `class_weight` act.
        caller: Name for messages.
        may_rest: Parameters that need not act.

    Returns:
        The modules of the first model as text.

    Raises:
        ValueError: nobody reads a parameter, or model_init returns what it has returned before.
    """
    description = ""
    unread: set[str] | None = None
    asked: set[str] = set()
    for params in points(space, seed):
        recorded = RecordingDict(params)
        try:
            with seeded(seed, CPU):
                model: Any = model_init(recorded)
                again = model_init(dict(params)) if unread is None else None
        except Exception:  # the user's model may raise anything
            strange = set(params) - recorded.read - KNOWN
            misspelt = [name for name in sorted(strange) if _closest(name, recorded.missing)]
            if misspelt:
                raise ValueError(_refusal(misspelt[0], recorded.missing, space, caller)) from None
            return description
        if not isinstance(model, nn.Module):
            return description
        if sys.getrefcount(recorded) > UNSHARED:  # the model has kept it, and may read it later
            recorded.note_all()
        if again is not None:
            _check_new(model, again, caller)
            description = re.sub(r"0x[0-9a-f]+", "", str(model))
        read = recorded.read | read_by_loop(params, model, label_parameters_act=label_parameters_act)
        absent = {name for name, value in params.items() if value is None and name in KNOWN}
        asked |= recorded.missing
        unread = set(params) - read - absent - may_rest if unread is None else (unread - read)
        if not unread:
            return description
    if unread:
        raise ValueError(_refusal(sorted(unread)[0], asked, space, caller))
    return description


def probe_context(context: FoldContext, spec: StudySpec) -> str:
    """Do what `probe` does for the folds of a study."""
    return probe(
        context.model_init,
        spec.parameters,
        seed=context.seed,
        label_parameters_act=has_label_parameters(context.objective.loss, context.data),
        caller=spec.caller,
    )


def points(space: Space, seed: int) -> Iterator[dict[str, Any]]:
    """Yield points of a space: of a mapping the lowest and one for each further choice; then random ones."""
    if space.function is None:
        lowest = {name: dimension.first for name, dimension in space.dimensions()}
        yield space.sample(FixedTrial(lowest))
        for name, dimension in space.dimensions():
            for option in dimension.options[1:] if isinstance(dimension, Choice) else ():
                yield space.sample(FixedTrial({**lowest, name: option}))
    with quiet_logging():
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    for _ in range(RANDOM_DRAWS):
        yield space.sample(study.ask())


def _check_new(model: nn.Module, again: Any, caller: str) -> None:
    """Refuse a second model that trains the memory of the first: what one fold learns the next would know."""
    remedy = "expected a new model at each call. Build it inside model_init, or return copy.deepcopy of it."
    if again is model:
        raise ValueError(f"{caller}: model_init returned the same {type(model).__name__} twice; {remedy}")
    if not isinstance(again, nn.Module):
        return
    seen = _trained_memory(model)
    for address, name in _trained_memory(again).items():
        if address in seen:
            raise ValueError(
                f"{caller}: two models of model_init share the parameter {name!r}, which is trained; {remedy}"
            )


def _trained_memory(model: nn.Module) -> dict[int, str]:
    return {
        parameter.untyped_storage().data_ptr(): name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        and not isinstance(parameter, nn.parameter.UninitializedParameter)
        and parameter.untyped_storage().data_ptr()
    }


def _closest(name: str, names: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(name, sorted(names), n=1)), None)


def _refusal(name: str, asked: set[str], space: Space, caller: str) -> str:
    if name in SOMETIMES_READ:
        return (
            f"{caller}: parameter {name!r} acts in no trial: {SOMETIMES_READ[name]}, and model_init does not "
            f"read it; expected it left out."
        )
    if name in KNOWN:
        optimizer = space.entries.get("optimizer", "sgd")
        shown = optimizer.options if isinstance(optimizer, Choice) else optimizer
        return (
            f"{caller}: parameter {name!r} acts in no trial: the optimizer {shown!r} does not take it, and "
            "model_init does not read it; expected it left out, or another optimizer."
        )
    close = ALIASES.get(name) or _closest(name, asked) or _closest(name, KNOWN)
    hint = f" Did you mean {close}?" if close else ""
    return (
        f"{caller}: parameter {name!r} is read by nobody, neither model_init nor the training loop; expected "
        f"one that acts.{hint}"
    )
