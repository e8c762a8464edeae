"""Search dimensions and spaces: what a trial may choose, and what it hands to the training loop."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import optuna

MAX_GRID_VALUES = 10_000


@dataclass(frozen=True)
class Float:
    """A real number in [low, high], uniform, or log-uniform with `log`, or every `step`."""

    low: float
    high: float
    log: bool = False
    step: float | None = None

    def __post_init__(self) -> None:
        """Check the bounds."""
        _check_range("Float", self.low, self.high, self.log, self.step)

    def suggest(self, trial: optuna.trial.BaseTrial, name: str) -> float:
        """Let the trial choose a value."""
        return trial.suggest_float(name, self.low, self.high, log=self.log, step=self.step)

    def grid(self, name: str) -> list[float]:
        """Return the values of a grid over this dimension."""
        if self.step is None:
            raise ValueError(
                f"Float.grid: dimension {name!r} is continuous; expected a step or a Choice for "
                f"sampler='grid'. Give Float({self.low}, {self.high}, step=...) or Choice([...])."
            )
        count = math.floor((self.high - self.low) / self.step + 1e-9) + 1
        return [self.low + i * self.step for i in range(_check_grid_size(name, count))]


@dataclass(frozen=True)
class Int:
    """An integer in [low, high], every `step`, or log-uniform with `log`."""

    low: int
    high: int
    log: bool = False
    step: int = 1

    def __post_init__(self) -> None:
        """Check the bounds."""
        for bound in (self.low, self.high, self.step):
            if isinstance(bound, bool) or not isinstance(bound, int):
                raise TypeError(f"Int: {bound!r} is not an integer; expected low, high and step as int.")
        if self.log and self.step != 1:
            raise ValueError(f"Int: step={self.step} with log=True; expected one of the two.")
        _check_range("Int", self.low, self.high, self.log, None if self.log else self.step)

    def suggest(self, trial: optuna.trial.BaseTrial, name: str) -> int:
        """Let the trial choose a value."""
        return trial.suggest_int(name, self.low, self.high, log=self.log, step=self.step)

    def grid(self, name: str) -> list[int]:
        """Return the values of a grid over this dimension."""
        values = range(self.low, self.high + 1, self.step)
        _check_grid_size(name, len(values))
        return list(values)


@dataclass(frozen=True)
class Choice:
    """One of several values: None, bool, int, float or str, which is what an Optuna storage can keep."""

    options: tuple[Any, ...]

    def __init__(self, options: Any) -> None:
        object.__setattr__(self, "options", tuple(options))
        if not self.options:
            raise ValueError("Choice: no options; expected at least one.")
        for option in self.options:
            if not (option is None or isinstance(option, (bool, int, float, str))):
                raise TypeError(
                    f"Choice: option {option!r} is a {type(option).__name__}; expected None, bool, int, "
                    "float or str. Choose by name and look the object up in model_init."
                )

    def suggest(self, trial: optuna.trial.BaseTrial, name: str) -> Any:
        """Let the trial choose a value."""
        return trial.suggest_categorical(name, self.options)

    def grid(self, name: str) -> list[Any]:
        """Return the values of a grid over this dimension."""
        del name
        return list(self.options)


Dimension: TypeAlias = Float | Int | Choice
DIMENSIONS = (Float, Int, Choice)
SpaceLike: TypeAlias = "Space | Mapping[str, Any] | Callable[[optuna.trial.BaseTrial], Mapping[str, Any]]"


class Space:
    """A mapping of parameter names to dimensions or fixed values, or a function of an Optuna trial.

    Args:
        definition: Mapping whose values are `Float`, `Int`, `Choice` or fixed values, or a function that
            takes an Optuna trial and returns the parameters as a dict.

    Raises:
        TypeError: the definition is neither.
        ValueError: `lr_x_max_norm` stands beside `lr`, or `max_norm` is missing or may be None beside it.
    """

    def __init__(self, definition: SpaceLike) -> None:
        self.function: Callable[[optuna.trial.BaseTrial], Mapping[str, Any]] | None = None
        self.entries: dict[str, Any] = {}
        if isinstance(definition, Space):
            self.function, self.entries = definition.function, dict(definition.entries)
        elif isinstance(definition, Mapping):
            self.entries = dict(definition)
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
            return resolve(dict(self.function(trial)))
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
            return {"function": _describe_function(self.function)}
        return {
            name: {"type": type(entry).__name__, **asdict(entry)}
            if isinstance(entry, DIMENSIONS)
            else {"fixed": entry if _is_plain(entry) else _describe_function(entry)}
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


def _check_range(kind: str, low: float, high: float, log: bool, step: float | None) -> None:
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"{kind}: low={low}, high={high}; expected finite bounds.")
    if low > high:
        raise ValueError(f"{kind}: low={low} is above high={high}; expected low <= high.")
    if log and low <= 0:
        raise ValueError(f"{kind}: log=True with low={low}; expected low > 0.")
    if step is not None and step <= 0:
        raise ValueError(f"{kind}: step={step}; expected a positive step.")
    if log and step is not None:
        raise ValueError(f"{kind}: step={step} with log=True; expected one of the two.")


def _check_grid_size(name: str, count: int) -> int:
    if count > MAX_GRID_VALUES:
        raise ValueError(
            f"Space.grid: dimension {name!r} has {count} values; expected at most {MAX_GRID_VALUES}. "
            "Give a larger step or a Choice."
        )
    return count


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))


def _describe_function(function: Any) -> str:
    name = (
        f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', type(function).__name__)}"
    )
    try:
        return f"{name}\n{inspect.getsource(function)}"
    except (OSError, TypeError):  # no source: defined in a prompt, or not a function at all
        return name
