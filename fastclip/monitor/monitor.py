"""`Monitor`: watches the steps of a clipped optimizer and writes down what they found."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from fastclip.monitor.blocks import Block, block_for, fits
from fastclip.monitor.parameters import Parameters, UpdateRatio
from fastclip.monitor.records import EVENTS, Record, Recorder
from fastclip.monitor.writers import JSONL, Writer, last_step, open_writers, write
from fastclip.optim import AttachedClipping, ClippedOptimizer, Outcome
from fastclip.optim.callers import is_checkpointing
from fastclip.optim.settings import Settings
from fastclip.optim.wrapper import settings_of

WINDOW = 100


class Monitor:
    """Records every step of a clipped optimizer, and warns early.

        with fastclip.Monitor(optimizer, "runs/first", model=model) as monitor:
            ...
            optimizer.step()
            monitor.step(loss)

    The optimizer's own step is what is recorded, through a hook; `step` only adds the loss and may be left
    out. Records are collected where the outcomes are and written in blocks: on a device no step waits, and
    a process that is killed loses the block that was not full. Memory does not grow with the steps. A
    directory that holds a run already goes on with it: from the step of `load_state_dict`, else after the
    last one written.

    Log messages go to the logger `fastclip.monitor`: early warnings, and steps that are not finite.

    Args:
        optimizer: A `ClippedOptimizer`, or what `fastclip.attach` returned.
        run: Directory of the files; None if `to` names none.
        model: Names the parameters and their modules; else they have the optimizer's names or positions.
        every: Steps in a block.
        per_parameter: Measure the norm of each gradient, one more read of them: in every step, or with a
            number in every so many. With DTensors all ranks have to, and the host waits. On a device this is
            also what tells which gradients were not finite; on the CPU they are looked at when it happens.
        update_ratio: Once per block, measure the norm of the update over that of the weights. Needs memory
            for the weights once more during that step.
        window: Steps over which the clipped share is taken; warnings compare one window with the next.
        to: What to write: "jsonl", "csv", "tensorboard", or callables that take a list of records. One that
            raises is logged and called again for the next block.
        on_warning: Called with each record of kind `warning` or `nonfinite`, after its block is written: on
            the CPU, that is at once for a step that is not finite. What it raises ends the training.

    Raises:
        TypeError: The optimizer is not clipped by fastclip, or `to` is no list of names and callables.
        ValueError: Another argument makes no sense.
        ImportError: TensorBoard is not installed.
        OSError: The directory cannot be written.
    """

    def __init__(
        self,
        optimizer: ClippedOptimizer | AttachedClipping,
        run: str | Path | None = None,
        *,
        model: nn.Module | None = None,
        every: int = 50,
        per_parameter: bool | int = False,
        update_ratio: bool = False,
        window: int = WINDOW,
        to: Iterable[str | Writer] = ("jsonl",),
        on_warning: Callable[[Record], object] | None = None,
    ) -> None:
        if not isinstance(optimizer, ClippedOptimizer | AttachedClipping):
            raise TypeError(
                f"Monitor: got a {type(optimizer).__name__}; expected a ClippedOptimizer or what "
                f"fastclip.attach returned. Of a trainer's optimizer, hand in the one that it wraps."
            )
        for name, value, least in (
            ("every", every, 1),
            ("window", window, 1),
            ("per_parameter", per_parameter, 0),
        ):
            if value < least:
                raise ValueError(f"Monitor: {name}={value}; expected at least {least}.")
        self._source = optimizer
        self._optimizer = optimizer.optimizer if isinstance(optimizer, AttachedClipping) else optimizer
        settings = settings_of(self._optimizer)
        if settings is None:
            raise ValueError("Monitor: the handle was removed from its optimizer; expected one that clips.")
        self._settings: Settings = settings
        self._every, self._per_parameter, self._measures_updates = every, int(per_parameter), update_ratio
        self._parameters = Parameters(self._optimizer, model)
        self._recorder = Recorder(self._parameters, window)
        self._on_warning = on_warning
        directory = None if run is None else Path(run)
        self._writers = open_writers(to, directory)
        self._step = 0 if directory is None else last_step(directory / JSONL)
        self._has_begun = False
        self._block: Block | None = None
        self._seen: Outcome | None = optimizer.last
        self._lacks_loss = self._is_captured = False
        self._was_finite, self._has_news = True, False
        self._update: UpdateRatio | None = None
        self._hooks = [
            self._optimizer.register_step_pre_hook(self._before_step),
            self._optimizer.register_step_post_hook(self._after_step),
        ]

    def step(self, loss: float | Tensor | None = None) -> None:
        """Add the loss of the step that the optimizer has just taken; call it after that step.

        Where the optimizer took none since, as while gradients accumulate or when a GradScaler left its step
        out, nothing happens. A step in the replay of a CUDA graph runs no hook: this call records it.

        Args:
            loss: One number. A tensor on a device is not waited for.

        Raises:
            RuntimeError: The monitor is closed.
        """
        if not self._hooks:
            raise RuntimeError("Monitor.step: this monitor is closed; expected an open one.")
        if self._is_captured and not self._lacks_loss and self._source.last is not None:
            self._record(self._source.last)
        if self._lacks_loss and self._block is not None and loss is not None:
            self._block.set_loss(loss.detach() if isinstance(loss, Tensor) else loss)
        self._lacks_loss = False
        if self._block is not None and self._is_due(self._block):
            self._turn_over(self._block)

    def flush(self) -> None:
        """Write what has been collected; waits for the device."""
        if self._block is not None:
            self._turn_over(self._block)
            self._write(wait=True)
        self._lacks_loss = False

    def close(self) -> None:
        """Write what has been collected and take the hooks off. Calling it again is harmless."""
        if not self._hooks:
            return
        while self._hooks:
            self._hooks.pop().remove()
        self.flush()
        for writer in self._writers:
            if callable(close := getattr(writer, "close", None)):
                close()

    def state_dict(self) -> dict[str, Any]:
        """Return the step and the latest window, for a checkpoint; first writes what has been collected."""
        self.flush()
        return {"step": self._step, "history": self._recorder.history.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the step of a checkpoint; what the run's files tell of later steps is superseded.

        Raises:
            RuntimeError: This monitor has recorded steps.
        """
        if self._block is not None:
            raise RuntimeError("Monitor.load_state_dict: steps were recorded already; expected none before.")
        self._step = int(state["step"])
        self._recorder.history.load_state_dict(state["history"])
        self._was_finite = self._recorder.history.was_finite

    def __enter__(self) -> Monitor:
        """Return the monitor."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close; the step that raised, which no hook has followed, is recorded first."""
        if error is not None and self._hooks and self._source.last not in (None, self._seen):
            self._record(self._source.last)
        self.close()

    def _before_step(self, optimizer: object, args: object, kwargs: object) -> None:
        starts_block = self._block is None or self._is_due(self._block) or not self._block.num_rows
        if self._measures_updates and starts_block and not is_checkpointing() and not _is_capturing():
            self._update = UpdateRatio(self._parameters.tensors)

    def _after_step(self, optimizer: object, args: object, kwargs: object) -> None:
        if is_checkpointing() or self._source.last is None or settings_of(self._optimizer) is None:
            return
        if _is_capturing():  # what is launched here would be launched again by every replay
            self._is_captured = True
            return
        self._record(self._source.last)

    def _record(self, outcome: Outcome | None) -> None:
        assert outcome is not None  # every caller has looked
        self._settings = settings_of(self._optimizer) or self._settings
        block = self._block_for(outcome)
        self._write(wait=False)
        norms = update = None
        if self._per_parameter and self._step % self._per_parameter == 0:
            norms = self._parameters.norms(outcome.total_norm, self._settings.norm_type)
        if self._update is not None:
            update, self._update = self._update.after_step(), None
        self._note_culprits(outcome)
        block.put(outcome, self._threshold(outcome), norms, update)
        self._step += 1
        self._seen, self._lacks_loss = outcome, True

    def _threshold(self, outcome: Outcome) -> float | Tensor:
        """Return the threshold of the step; nan if it has none that is one number."""
        threshold: Any = getattr(outcome, "threshold", None)
        if threshold is None:
            threshold = self._settings.max_norm
        return threshold if isinstance(threshold, float | int | Tensor) else math.nan

    def _note_culprits(self, outcome: Outcome) -> None:
        """Look at the gradients of a step that is not finite while they are there, if the host knows it."""
        numbers = outcome.numbers()
        if numbers is None:
            return
        norm, _, skipped = numbers
        is_finite = math.isfinite(norm) and not skipped
        if not is_finite and self._was_finite:
            has_scaler = isinstance(getattr(self._optimizer, "found_inf", None), Tensor)
            known = {"scaled": True} if has_scaler else {}
            self._recorder.culprits[self._step + 1] = self._parameters.nonfinite() | known
            self._has_news = True
        self._was_finite = is_finite

    def _block_for(self, outcome: Outcome) -> Block:
        """Return a block with room for the outcome."""
        block = self._block
        if block is not None and not fits(block, outcome):
            self.flush()
            block = None
        if block is None:
            width = len(self._parameters.tensors) if self._per_parameter else 0
            block = self._block = block_for(outcome, self._every, width)
        elif self._is_due(block):
            self._turn_over(block)
        return block

    def _is_due(self, block: Block) -> bool:
        """Whether a block is to be written: it is full, or has a step that someone should hear of now."""
        return block.is_full or self._has_news

    def _turn_over(self, block: Block) -> None:
        """Put the rows of a block on their way to the files."""
        self._has_news = False
        self._write(wait=True)  # those before: they have had a whole block's time
        if block.num_rows:
            block.send(self._step - block.num_rows + 1)
            self._write(wait=False)

    def _write(self, *, wait: bool) -> None:
        rows = None if self._block is None else self._block.take(wait=wait)
        if rows is None:
            return
        records = self._recorder.records(rows)
        if not self._has_begun:
            self._has_begun = True
            records.insert(0, self._run_record(rows.first - 1))
        write(self._writers, records)
        if self._on_warning is not None:
            for record in records:
                if record["kind"] in EVENTS:
                    self._on_warning(record)

    def _run_record(self, after: int) -> Record:
        names = [place.name for place in self._parameters.places] if self._per_parameter else []
        wrapped = (
            self._optimizer.optimizer if isinstance(self._optimizer, ClippedOptimizer) else self._optimizer
        )
        return {
            "kind": "run",
            "after": after,
            "time": time.time(),
            "optimizer": type(wrapped).__name__,
            "max_norm": self._settings.max_norm,
            "norm_type": self._settings.norm_type,
            "every": self._every,
            "window": self._recorder.history.window,
            "parameters": names,
        }


def _is_capturing() -> bool:
    is_used = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return bool(is_used) and torch.cuda.is_current_stream_capturing()
