"""From rows to records: what is written, what is warned of.

A record is a dict whose `kind` says what it tells:

    run          once whenever a monitor begins: `after`, the step after which it goes on, and its settings
    step         every step: step, time, loss, norm, threshold, coef, skipped, clipped_share, and on request
                 largest (name -> norm) and update_ratio
    parameters   once per block, on request: the median norm of each parameter in the block, in the order of
                 the `parameters` of the run's record
    nonfinite    the first of consecutive steps that were not finite: parameters, and the norms before
    warning      an early warning: cause, before, after, text
"""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastclip.monitor.alarms import Alarms
from fastclip.monitor.blocks import NO_GRADIENT, Rows
from fastclip.monitor.history import History
from fastclip.monitor.parameters import Parameters

Record = dict[str, Any]
NUM_LARGEST = 5

EVENTS = ("nonfinite", "warning")
"""Kinds that tell of something wrong."""

logger = logging.getLogger("fastclip.monitor")


class Recorder:
    """Turns rows into records, in the order of the steps, and logs what is wrong.

    Args:
        parameters: Whose norms the rows hold, and who can be named.
        window: Steps over which shares are taken.
    """

    def __init__(self, parameters: Parameters, window: int) -> None:
        self.history = History(window)
        self.culprits: dict[int, Record] = {}
        """Step -> what was known of its parameters when it was taken."""
        self._parameters = parameters
        self._alarms = Alarms(self.history, parameters.modules)

    def records(self, rows: Rows) -> list[Record]:
        """Return the records of a block."""
        found: list[Record] = []
        for index, (norm, coef, skipped, threshold, update, loss) in enumerate(rows.values.tolist()):
            step, time = rows.first + index, rows.times[index]
            measured = (
                None if rows.norms is None or (rows.norms[index] == NO_GRADIENT).all() else rows.norms[index]
            )
            head = {"step": step, "time": time, "norm": norm, "skipped": bool(skipped)}
            if self.history.was_finite and (skipped or not math.isfinite(norm)):
                found.append(self._nonfinite(head, measured))
            norms = None if measured is None else _known(measured)
            self.history.add(norm, coef < 1 and not skipped, bool(skipped), norms)
            record = {
                "kind": "step",
                **head,
                "loss": loss if rows.has_loss[index] else None,
                "threshold": threshold,
                "coef": coef,
                "clipped_share": self.history.clipped_share,
            }
            if norms is not None:
                record["largest"] = self._largest(norms)
            if not math.isnan(update):
                record["update_ratio"] = update
            found.append(record)
        step = rows.first + len(rows.times) - 1
        last = {"step": step, "time": rows.times[-1]}
        if rows.norms is not None:
            medians = _medians(_known(rows.norms))
            found.append({"kind": "parameters", "first": rows.first, **last, "norms": medians})
        for warning in self._alarms.check(step):
            found.append({"kind": "warning", **last, **warning})
            logger.warning(f"step {step}: {warning['text']}")
        return found

    def _nonfinite(self, head: Record, norms: NDArray[np.float32] | None) -> Record:
        known = self.culprits.pop(head["step"], {})
        if "parameters" not in known and norms is not None:
            known |= self._parameters.nonfinite_by_norms(norms)
        record = {"kind": "nonfinite", **head, **known, "before": self.history.before()}
        # A scaler finds its scale by steps that overflow.
        logger.log(logging.INFO if record.get("scaled") else logging.WARNING, describe(record))
        return record

    def _largest(self, norms: NDArray[np.float32]) -> dict[str, float]:
        known = np.nan_to_num(norms, nan=-1.0)
        order = np.argsort(-known, kind="stable")[:NUM_LARGEST]
        return {self._parameters.places[i].name: _short(norms[i]) for i in order if not math.isnan(norms[i])}


def describe(record: Record) -> str:
    """Return the sentence that tells of a record of kind `nonfinite` or `warning`."""
    if record["kind"] == "warning":
        return str(record["text"])
    did = "was skipped" if record["skipped"] else "was taken"
    before = ", ".join(f"{float(norm):.3g}" for norm in record["before"]) or "none"
    scaled = ", under a GradScaler," if record.get("scaled") else ""
    return (
        f"step {record['step']} is not finite{scaled} and {did} (norm {float(record['norm'])}): "
        f"{_culprits(record)}; the norms before: {before}"
    )


def _culprits(record: Record) -> str:
    if "parameters" not in record:
        return "the gradients were on a device and are gone; per_parameter=True tells which they are"
    if not record["parameters"]:
        return "every gradient is finite"
    first = record["parameters"][0]
    module = f" of {first['module']} ({first['class']})" if first["class"] else ""
    counts = "" if first["nan"] is None else f": {first['nan']} nan, {first['inf']} inf"
    more = record["num_parameters"] - 1
    return f"{first['name']}{module}{counts}" + (f", and {more} more" if more else "")


def _known(norms: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return norms with nan for gradients that are not there."""
    return np.where(norms == NO_GRADIENT, np.float32(np.nan), norms)


def _medians(norms: NDArray[np.float32]) -> list[float]:
    """Return the median of the finite norms of each parameter; nan where there is none."""
    finite = np.isfinite(norms)
    absent = ~np.any(finite, axis=0, keepdims=True)
    medians = np.nanmedian(np.where(finite, norms, np.where(absent, 0, np.nan)), axis=0)
    return [_short(m) for m in np.where(absent[0], np.nan, medians)]


def _short(norm: float) -> float:
    """Return what float32 knows of a norm, in few digits."""
    return float(f"{norm:.6g}")
