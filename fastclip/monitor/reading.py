"""Read what a monitor has written, also while it writes."""

from __future__ import annotations

import json
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastclip.monitor.records import EVENTS, Record
from fastclip.monitor.writers import JSONL

COLUMNS = ("step", "time", "loss", "norm", "threshold", "coef", "skipped", "clipped_share", "update_ratio")


@dataclass(frozen=True)
class Run:
    """The steps of a run, in order; those that a resumed run took again count once.

    Attributes:
        path: The file.
        columns: Name in COLUMNS -> float64, one per step; nan where one is not known.
        events: Records of kind `nonfinite` and `warning`.
        settings: The latest record of kind `run`.
        parameters: Names of the parameters whose norms were measured.
        norm_steps: First step of each block of `parameter_norms`.
        parameter_norms: Median norm, a row per block and a column per parameter.
    """

    path: Path
    columns: dict[str, NDArray[np.float64]]
    events: list[Record]
    settings: Record
    parameters: list[str]
    norm_steps: NDArray[np.int64]
    parameter_norms: NDArray[np.float64]

    def __len__(self) -> int:
        """Count the steps."""
        return len(self.columns["step"])

    def __getitem__(self, name: str) -> NDArray[np.float64]:
        """Return a column."""
        return self.columns[name]

    @property
    def clipped(self) -> NDArray[np.bool_]:
        """Return which steps were clipped."""
        return (self["coef"] < 1) & ~self.skipped

    @property
    def skipped(self) -> NDArray[np.bool_]:
        """Return which steps were skipped."""
        return self["skipped"] > 0

    @property
    def finite_norms(self) -> NDArray[np.float64]:
        """Return the norms that are finite, in order."""
        return self["norm"][np.isfinite(self["norm"])]


class Reader:
    """Reads a run bit by bit: each `update` takes the lines that are new and whole.

    Args:
        run: The directory that a monitor writes to, or its file.

    Raises:
        FileNotFoundError: There is no such run.
    """

    def __init__(self, run: str | Path) -> None:
        path = Path(run)
        self.path = path / JSONL if path.is_dir() else path
        if not self.path.is_file():
            raise FileNotFoundError(
                f"{run} holds no run of a monitor; expected a directory with {JSONL}, or such a file."
            )
        self._offset = self._num_lines = 0
        self._steps = array("d")
        self._events: list[Record] = []
        self._settings: Record = {}
        self._norms: list[tuple[int, list[float]]] = []

    def update(self) -> bool:
        """Read on; return whether there was anything.

        Raises:
            ValueError: A line is no record; the message names it.
        """
        start = self._offset
        with open(self.path, "rb") as file:
            if file.seek(0, 2) < start:  # cut, by a run that resumes, or replaced
                self.__init__(self.path)  # type: ignore[misc]
                start = -1
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break  # torn by a kill, or not yet written to its end
                self._offset += len(line)
                self._num_lines += 1
                self._add(line)
        return self._offset != start

    def run(self) -> Run:
        """Return what has been read."""
        table = np.array(self._steps).reshape(-1, len(COLUMNS))
        names = list(self._settings.get("parameters", []))
        fitting = [(first, norms) for first, norms in self._norms if len(norms) == len(names)]
        return Run(
            self.path,
            {name: table[:, index] for index, name in enumerate(COLUMNS)},
            list(self._events),
            self._settings,
            names,
            np.array([first for first, _ in fitting], dtype=np.int64),
            np.array([norms for _, norms in fitting]).reshape(len(fitting), len(names)),
        )

    def _add(self, line: bytes) -> None:
        try:
            record = json.loads(line.decode())
            kind = record["kind"]
            if kind == "step":
                self._steps.extend(_number(record.get(name)) for name in COLUMNS)
            elif kind == "run":
                self._settings = record
                self._forget_after(int(record["after"]))
            elif kind == "parameters":
                self._norms.append((int(record["first"]), [float(norm) for norm in record["norms"]]))
            elif kind in EVENTS:
                self._events.append(record)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.path}, line {self._num_lines}: {line[:60]!r} is no record of a monitor ({error}); "
                "expected what fastclip.Monitor writes."
            ) from error

    def _forget_after(self, step: int) -> None:
        """Drop what a run that went on from an earlier step supersedes."""
        width = len(COLUMNS)
        num = len(self._steps) // width
        while num and self._steps[(num - 1) * width] > step:
            num -= 1
        del self._steps[num * width :]
        self._events = [event for event in self._events if event["step"] <= step]
        self._norms = [entry for entry in self._norms if entry[0] <= step]


def read(run: str | Path) -> Run:
    """Read a run.

    Args:
        run: The directory that a monitor writes to, or its file.

    Raises:
        FileNotFoundError: There is no such run.
        ValueError: A line is no record; the message names it.
    """
    reader = Reader(run)
    reader.update()
    return reader.run()


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)
