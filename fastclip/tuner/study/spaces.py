"""Search spaces: what a trial may choose, and what it hands to the training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any, TypeAlias

import optuna

from fastclip.tuner.study.dimensions import DIMENSIONS, MAX_GRID_VALUES, Choice, Dimension, Float, Int
from fastclip.tuner.study.fingerprints import callable_digest, describe
from fastclip.tuner.study.foreign import as_entry

__all__ = ["DIMENSIONS", "MAX_GRID_VALUES", "Choice", "Float", "Int", "Space", "SpaceLike", "resolve"]

SpaceLike: TypeAlias = "Space | Mapping[str, Any] | Callable[[optuna.trial.BaseTrial], Mapping[str, Any]]"


class Space:
    """A mapping of parameter names to dimensions or fixed values, or a function of an Optuna trial.

    Args:
        definition: Mapping whose values are `Float`, `Int`, `Choice` or what `as_entry` takes for them, or
            fixed values; or a function that takes an Optuna trial and returns the parameters as a dict.

    Raises:
        TypeError: the definition is neither, or a value is no dimension although it looks like one.
        ValueError: `lr_x_max_norm` stands beside `lr`, or `max_norm` is missing or may be None beside it.
    """

    def __init__(self, definition: SpaceLike) -> None:
        self.function: Callable[[optuna.trial.BaseTrial], Mapping[str, Any]] | None = None
        self.entries: dict[str, Any] = {}
        if isinstance(definition, Space):
            self.function, self.entries = definition.function, dict(definition.entries)
        elif isinstance(definition, Mapping):
            self.entries = {name: as_entry(name, value) for name, value in definition.items()}
            self._check_decoupled_rate()
        elif callable(definition):
            self.function = definition
        else:
            raise TypeError(
                f"Space: {definition!r} is a {type(definition).__name__}; expected a mapping of names to "
                "Float, Int, Choice or fixed values, or a function of an Optuna trial."
            )

    def dimensions(self) -> Iterator[tuple[str, Dimension]]:
        """Yield the names and dimensions that a trial chooses; nothing for a function."""
        return ((name, entry) for name, entry in self.entries.items() if isinstance(entry, DIMENSIONS))

    def sample(self, trial: optuna.trial.BaseTrial) -> dict[str, Any]:
        """Return the parameters of a trial, with `lr` worked out from `lr_x_max_norm`."""
        if self.function is not None:
            return resolve(_chosen(self.function(trial)))
        return resolve(
            {
                name: entry.suggest(trial, name) if isinstance(entry, DIMENSIONS) else entry
                for name, entry in self.entries.items()
            }
        )

    def grid(self) -> dict[str, list[Any]]:
        """Return the values per dimension for a grid search.

        Raises:
            ValueError: a dimension is continuous, or the space is a function.
        """
        if self.function is not None:
            raise ValueError("Space.grid: the space is a function; expected a mapping for sampler='grid'.")
        return {name: dimension.grid(name) for name, dimension in self.dimensions()}

    def describe(self) -> dict[str, Any]:
        """Return the space as plain values: equal descriptions mean that a study may be resumed."""
        if self.function is not None:
            return {"function": describe(self.function)}
        return {
            name: {"type": type(entry).__name__, **asdict(entry)}
            if isinstance(entry, DIMENSIONS)
            else {"fixed": entry if _is_plain(entry) else callable_digest(entry)}
            for name, entry in self.entries.items()
        }

    def _check_decoupled_rate(self) -> None:
        if "lr_x_max_norm" not in self.entries:
            return
        if "lr" in self.entries:
            raise ValueError("Space: both lr and lr_x_max_norm are given; expected one of them.")
        max_norm = self.entries.get("max_norm")
        if max_norm is None or (isinstance(max_norm, Choice) and None in max_norm.options):
            raise ValueError(
                "Space: lr_x_max_norm is given but max_norm is, or may be, None; expected a threshold in "
                "every trial, because lr = lr_x_max_norm / max_norm. Search lr itself to compare with no "
                "clipping."
            )


def resolve(params: dict[str, Any]) -> dict[str, Any]:
    """Add `lr` = `lr_x_max_norm` / `max_norm` when the product is what was chosen."""
    if "lr_x_max_norm" not in params:
        return params
    if not params.get("max_norm"):
        raise ValueError(
            f"resolve: lr_x_max_norm with max_norm={params.get('max_norm')!r}; expected a positive threshold."
        )
    return {**params, "lr": params["lr_x_max_norm"] / params["max_norm"]}


def _chosen(params: Mapping[str, Any]) -> dict[str, Any]:
    for name, value in params.items():
        if isinstance(as_entry(name, value), DIMENSIONS):
            raise TypeError(
                f"Space: the function returned {name} = {value!r}; expected one value, as "
                "trial.suggest_float(name, low, high) and the like choose it."
            )
    return dict(params)


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))
