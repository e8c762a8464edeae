"""The rows of a run and the file they go to."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fastclip.bench.bandwidth import Bandwidth
from fastclip.bench.cases import Traffic
from fastclip.bench.devices import Times
from fastclip.bench.environment import Environment, Hardware
from fastclip.bench.models import Workload
from fastclip.bench.timing import Measurement
from fastclip.files import write_whole

SCHEMA = "fastclip-bench/1"

MIN_NBYTES = 2**20
"""Of gradients whose time on a device says something of its memory."""


class ResultsError(Exception):
    """A results file is missing or is not one."""


@dataclass(frozen=True)
class Row:
    """One case with everything that was measured.

    Attributes:
        model: Key of WORKLOADS.
        title: Its name for readers.
        traffic: Bytes that must move.
        read_gbps: Read bandwidth measured beside this row.
        update_gbps: Read and write bandwidth measured beside this row.
        floor_ms: Time that these need for the traffic.
        measurements: Peer -> times; the first peer is the one under test.
        relative_errors: Peer -> error of its norm against float64.
        host: Peer -> times of the host where it does not wait for the device.
        left_out: Peer -> why it was not timed.
    """

    model: str
    title: str
    dtype: str
    mode: str
    num_tensors: int
    numel: int
    traffic: Traffic
    read_gbps: float
    update_gbps: float
    floor_ms: float
    measurements: dict[str, Measurement]
    relative_errors: dict[str, float]
    host: dict[str, Measurement] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        workload: Workload,
        dtype: str,
        mode: str,
        traffic: Traffic,
        times: Times,
        bandwidth: Bandwidth,
        relative_errors: dict[str, float],
        left_out: dict[str, str] | None = None,
    ) -> Row:
        """Join what is known about one case."""
        return cls(
            model=workload.name,
            title=workload.title,
            dtype=dtype,
            mode=mode,
            num_tensors=workload.num_tensors,
            numel=workload.numel,
            traffic=traffic,
            read_gbps=bandwidth.read_gbps,
            update_gbps=bandwidth.update_gbps,
            floor_ms=bandwidth.floor_ms(traffic),
            measurements=times[0],
            relative_errors=relative_errors,
            host=times[1],
            left_out=left_out or {},
        )

    def of_device(self) -> dict[str, Any]:
        """Return plain values for the file of a run on a GPU, with the bandwidth that each peer reached."""
        return {
            **{"workload": self.model, "title": self.title, "mode": self.mode},
            **{"num_tensors": self.num_tensors, "nbytes": self.traffic.read_nbytes},
            "necessary_nbytes": self.traffic.nbytes,
            "device_ms": {name: m.quantiles_ms for name, m in self.measurements.items()},
            "host_ms": {name: m.quantiles_ms for name, m in self.host.items()},
            "num_rounds": {name: m.num_rounds for name, m in self.measurements.items()},
            "gbps": {name: self.traffic.nbytes / m.median_ms / 1e6 for name, m in self.measurements.items()},
            "relative_errors": self.relative_errors,
            "left_out": self.left_out,
        }

    @property
    def subject(self) -> str:
        """Return the name of the peer under test."""
        return next(iter(self.measurements))

    @property
    def subject_ms(self) -> float:
        """Return its median."""
        return self.measurements[self.subject].median_ms

    def ratio(self, peer: str) -> float:
        """Return how many times longer another peer takes, median by median."""
        return self.measurements[peer].median_ms / self.subject_ms

    @property
    def ratios(self) -> dict[str, float]:
        """Return the ratio to each other peer."""
        return {name: self.ratio(name) for name in self.measurements if name != self.subject}

    @property
    def gbps(self) -> float:
        """Return 10^9 necessary bytes per second."""
        return self.traffic.nbytes / self.subject_ms / 1e6

    @property
    def share(self) -> float:
        """Return the part of the measured bandwidth that was reached; caches can lift it above 1."""
        return self.floor_ms / self.subject_ms

    def __str__(self) -> str:
        """Return one line for a log."""
        ratios = ", ".join(f"{ratio:.2f}x {name}" for name, ratio in self.ratios.items())
        return f"{self.model} {self.dtype} {self.mode}: {self.subject_ms:.3f} ms, {ratios}"


@dataclass(frozen=True)
class Results:
    """A whole run.

    Attributes:
        options: As in `runner.Options`.
        bandwidth: Of all candidates, at the start; each row has that of the fastest, measured beside it.
    """

    environment: Environment
    options: dict[str, Any]
    bandwidth: Bandwidth
    rows: list[Row]

    def find(self, model: str, dtype: str, mode: str) -> Row:
        """Return one row.

        Raises:
            ResultsError: The run does not have it.
        """
        for row in self.rows:
            if (row.model, row.dtype, row.mode) == (model, dtype, mode):
                return row
        raise ResultsError(f"results: no row for {model} {dtype} {mode}. Run the benchmark with that case.")


def save(results: Results, path: Path) -> None:
    """Write a run as JSON, whole or not at all."""
    content = {"schema": SCHEMA, **asdict(results)}
    for row, entry in zip(results.rows, content["rows"], strict=True):
        del entry["host"], entry["left_out"]
        entry["derived"] = {"ratios": row.ratios, "gbps": row.gbps, "share": row.share}
    write_json(path, content)


def load(path: Path) -> Results:
    """Read a run back.

    Raises:
        ResultsError: The file is missing or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["schema"] != SCHEMA:
            raise ResultsError(
                f"{path}: schema {content['schema']!r}; expected {SCHEMA!r}. Run the benchmark again."
            )
        return Results(
            environment=_environment(content["environment"]),
            options=content["options"],
            bandwidth=Bandwidth(**content["bandwidth"]),
            rows=[_row(entry) for entry in content["rows"]],
        )
    except FileNotFoundError as error:
        raise ResultsError(f"{path}: no such file. Write it with `fastclip bench --json {path}`.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ResultsError(f"{path}: not a results file ({error!r}). Run the benchmark again.") from error


def read_run(path: Path) -> dict[str, Any]:
    """Return a run on a GPU, or a part of one, as its file has it: plain values."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def quoted_backend(run: dict[str, Any]) -> str:
    """Return the backend of fastclip that is quoted: the first that the run has checked."""
    return str(next(iter(run["checks"])))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write results with one row, or one entry of a part, on each line, so that a difference can be read."""
    parts = [f"{json.dumps(name)}: {_lines(part)}" for name, part in content.items()]
    write_whole(path, ("{\n" + ",\n".join(parts) + "\n}\n").encode())


def _lines(part: Any) -> str:
    if not part or not isinstance(part, (dict, list)):
        return json.dumps(part)
    if isinstance(part, list):
        return "[\n" + ",\n".join(f" {json.dumps(row)}" for row in part) + "\n]"
    entries = (f" {json.dumps(name)}: {_entry(entry)}" for name, entry in part.items())
    return "{\n" + ",\n".join(entries) + "\n}"


def _entry(entry: Any) -> str:
    has_rows = isinstance(entry, list) and any(isinstance(row, dict) for row in entry)
    return _lines(entry) if has_rows else json.dumps(entry)


def _environment(entry: dict[str, Any]) -> Environment:
    return Environment(**{**entry, "hardware": Hardware(**entry["hardware"])})


def _row(entry: dict[str, Any]) -> Row:
    fields = {name: value for name, value in entry.items() if name != "derived"}
    fields["traffic"] = Traffic(**entry["traffic"])
    fields["measurements"] = {
        name: Measurement(measured["num_rounds"], {int(q): ms for q, ms in measured["quantiles_ms"].items()})
        for name, measured in entry["measurements"].items()
    }
    return Row(**fields)
