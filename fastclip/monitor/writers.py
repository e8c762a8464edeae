"""Where records go: JSON lines, CSV, TensorBoard, or any callable that takes a list of records."""

from __future__ import annotations

import csv
import io
import json
import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

from fastclip.files import plain
from fastclip.monitor.records import EVENTS, Record, describe, logger

JSONL, CSV = "monitor.jsonl", "monitor.csv"
NAMES = ("jsonl", "csv", "tensorboard")
CSV_COLUMNS = (
    "step",
    "time",
    "loss",
    "norm",
    "threshold",
    "coef",
    "skipped",
    "clipped_share",
    "update_ratio",
)
_TAIL_BYTES = 1 << 16

Writer = Callable[[list[Record]], object]
"""Takes the records of a block, in one list for all writers. Its `close` is called, if there is one."""


class _Appending:
    """A file that whole lines are added to, a block in one write; what a kill tore off is cut away."""

    def __init__(self, path: Path) -> None:
        """Open the file, which is made with its folder if need be."""
        path.parent.mkdir(parents=True, exist_ok=True)
        cut_torn_line(path)
        # Unbuffered: a process that is killed has handed over every block that it wrote.
        self._file: BinaryIO = open(path, "ab", buffering=0)  # noqa: SIM115
        self.is_new = self._file.tell() == 0

    def append(self, text: str) -> None:
        """Add lines: all, or none if the disk is full."""
        start, rest = self._file.tell(), memoryview(text.encode())
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError:
            self._file.truncate(start)
            self._file.seek(start)
            raise

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class JsonLines(_Appending):
    """Writes every record as a line of JSON; inf and nan become strings, which float() reads back."""

    def __call__(self, records: list[Record]) -> None:
        """Add records."""
        self.append("".join(json.dumps(plain(record), allow_nan=False) + "\n" for record in records))


class Csv(_Appending):
    """Writes the records of steps as rows; the others have no place in a table."""

    def __call__(self, records: list[Record]) -> None:
        """Add rows, and the heading to an empty file."""
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, CSV_COLUMNS, extrasaction="ignore", lineterminator="\n")
        if self.is_new:
            writer.writeheader()
            self.is_new = False
        writer.writerows(record for record in records if record["kind"] == "step")
        self.append(text.getvalue())


def summary_writer(caller: str) -> Callable[[Path, int | None], Any]:
    """Return a function that opens torch's writer for TensorBoard, given a folder and a first step.

    What earlier files of the folder have of that step and of later ones, TensorBoard leaves out; None keeps
    all.

    Raises:
        ImportError: TensorBoard is not installed; the message begins with the caller.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            f"{caller}: TensorBoard is not installed; expected the extra `tensorboard`. pip install "
            "'fastclip[tensorboard]'"
        ) from error

    def open_after_others(folder: Path, first_step: int | None) -> Any:
        # TensorBoard reads files in the order of their names. The second of their making comes first in
        # those; what follows says nothing of the order.
        while any(folder.glob(f"events.out.tfevents.{int(time.time())}.*")):
            time.sleep(0.01)
        return SummaryWriter(str(folder), purge_step=first_step)

    return open_after_others


class TensorBoard:
    """Writes the numbers of steps as scalars `fastclip/...`, events as text; needs `fastclip[tensorboard]`.

    Steps that a resumed run takes again replace those of before.
    """

    def __init__(self, folder: Path) -> None:
        """Take the folder; its file is made by the first records.

        Raises:
            ImportError: TensorBoard is not installed.
        """
        self._open = summary_writer("Monitor: to='tensorboard'")
        self._folder = folder
        self._writer: Any = None

    def __call__(self, records: list[Record]) -> None:
        """Add scalars and text."""
        for record in records:
            if record["kind"] == "run":
                self.close()
                self._writer = self._open(self._folder, record["after"] + 1)
            elif record["kind"] == "step":
                for name in CSV_COLUMNS[2:]:
                    if record.get(name) is not None:
                        self._writer.add_scalar(
                            f"fastclip/{name}", float(record[name]), record["step"], record["time"]
                        )
            elif record["kind"] in EVENTS:
                self._writer.add_text("fastclip/events", describe(record), record["step"], record["time"])
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()


def open_writers(to: Iterable[str | Writer], run: Path | None) -> list[Writer]:
    """Return the writers that `to` asks for, their files in the directory of the run.

    Raises:
        ValueError: A name is unknown, or is that of a file and there is no directory.
        TypeError: Something is neither a name nor callable.
        ImportError: TensorBoard is not installed.
    """
    if isinstance(to, str) or callable(to):
        raise TypeError(f"Monitor: to={to!r}; expected a list: to=[{to!r}].")
    writers: list[Writer] = []
    for target in to:
        if callable(target):
            writers.append(target)
        elif not isinstance(target, str):
            raise TypeError(f"Monitor: to has a {type(target).__name__}; expected names and callables.")
        elif target not in NAMES:
            raise ValueError(f"Monitor: to={target!r}; expected one of {', '.join(NAMES)}, or a callable.")
        elif run is None:
            raise ValueError(f"Monitor: to={target!r} without a run; expected a directory: run='runs/first'.")
        elif target == "tensorboard":
            writers.append(TensorBoard(run))
        else:
            writers.append(JsonLines(run / JSONL) if target == "jsonl" else Csv(run / CSV))
    return writers


def write(writers: list[Writer], records: list[Record]) -> None:
    """Hand records to every writer; one that fails is logged, and training goes on."""
    for writer in writers:
        try:
            writer(records)
        except Exception:
            name = getattr(writer, "__name__", type(writer).__name__)
            steps = [record["step"] for record in records if "step" in record]
            span = f"steps {steps[0]} to {steps[-1]}" if steps else "no step"
            logger.log(
                logging.ERROR, f"Monitor: {name} failed and lost the records of {span}.", exc_info=True
            )


def cut_torn_line(path: Path) -> None:
    """Cut off what stands behind the last whole line of a file, if there is a file."""
    if not path.exists():
        return
    with open(path, "rb+") as file:
        end = file.seek(0, io.SEEK_END)
        while end > 0:
            start = max(0, end - _TAIL_BYTES)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                file.truncate(start + newline + 1)
                return
            end = start
        file.truncate(0)


def last_step(path: Path) -> int:
    """Return the number of the last step in a file of JSON lines; 0 if there is none."""
    if not path.exists():
        return 0
    with open(path, "rb") as file:
        end = file.seek(0, io.SEEK_END)
        reach = _TAIL_BYTES
        while True:
            start = max(0, end - reach)
            file.seek(start)
            for line in reversed(file.read().splitlines()):
                if b'"kind": "step"' in line or b'"kind": "run"' in line:
                    try:
                        record = json.loads(line)
                    except ValueError:
                        continue  # the first one may begin before what was read
                    return int(record["step"] if record["kind"] == "step" else record["after"])
            if start == 0:
                return 0
            reach *= 4
