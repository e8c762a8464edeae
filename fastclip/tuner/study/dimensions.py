"""Search dimensions: what a single parameter may be."""

from __future__ import annotations

import math
from dataclasses import dataclass
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

    @property
    def first(self) -> float:
        """The lowest value."""
        return self.low

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

    @property
    def first(self) -> int:
        """The lowest value."""
        return self.low

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

    @property
    def first(self) -> Any:
        """The first option."""
        return self.options[0]

    def grid(self, name: str) -> list[Any]:
        """Return the values of a grid over this dimension."""
        del name
        return list(self.options)


Dimension: TypeAlias = Float | Int | Choice
DIMENSIONS = (Float, Int, Choice)


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
