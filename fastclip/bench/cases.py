"""What is timed: a workload, a dtype and a mode, the thresholds of its calls and the bytes that must move."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import Parameter

from fastclip.bench.devices import Cuda
from fastclip.bench.models import Workload, gradients
from fastclip.bench.peers import Peer
from fastclip.bench.timing import Call

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}

MODES = {
    "norm": "the norm alone, through get_total_norm",
    "inactive": "the threshold is above the norm: nothing is clipped",
    "active": "the threshold is below the norm: every gradient is scaled",
}


@dataclass(frozen=True)
class Traffic:
    """The bytes that no implementation can avoid moving.

    Attributes:
        read_nbytes: Read in a pass that writes nothing.
        update_nbytes: Read and written in a pass that scales in place, both directions together.
    """

    read_nbytes: int
    update_nbytes: int

    @property
    def nbytes(self) -> int:
        """Return the bytes of both passes."""
        return self.read_nbytes + self.update_nbytes


def dtypes_of(dtype: str) -> tuple[torch.dtype, ...]:
    """Return the types that tensors take in turn: keys of DTYPES, joined by +."""
    return tuple(DTYPES[name] for name in dtype.split("+"))


@dataclass(frozen=True)
class Case:
    """One row of the benchmark."""

    workload: Workload
    dtype: str
    mode: str

    def __str__(self) -> str:
        """Return the three names."""
        return f"{self.workload.name} {self.dtype} {self.mode}"

    @property
    def nbytes(self) -> int:
        """Count the bytes of the gradients."""
        return self.workload.nbytes(*dtypes_of(self.dtype))

    @property
    def traffic(self) -> Traffic:
        """Return the byte model: N = numel * itemsize to read, 2 N more where gradients are scaled."""
        return Traffic(self.nbytes, 2 * self.nbytes if self.mode == "active" else 0)


class Clipping:
    """The threshold of each call, chosen so that call after call does the same work.

    Gradients that were clipped stay clipped, so a fixed threshold would be active once only. In `active`
    mode each call's threshold therefore lies SHRINK below the one before. That is more than the largest
    error of any peer (about 0.8 %: a bfloat16 norm and a bfloat16 coefficient), so the coefficient is
    below 1 in every call, and the same for all peers. Gradients that have lost half of their norm are
    doubled, which is exact, between two calls and outside the timing: they never come near the
    subnormal numbers.

    But a CUDA graph holds its threshold. With `fixed` it is half of the norm, and what a call has halved is
    doubled before the next one; a device with cold caches bears the pass between the two.

    Calls take turns over the lists, whose gradients are copies of each other.
    """

    SHRINK = 0.02

    def __init__(
        self, lists: Sequence[list[Parameter]], mode: str, total_norm: float, *, fixed: bool = False
    ) -> None:
        """Take the parameters, one list unless fixed, and the true norm of the gradients of each."""
        self.lists = lists
        self.mode = mode
        self.fixed = fixed
        self._half_norm = total_norm / 2
        self.max_norm = 1e3 * total_norm
        if mode == "active":
            self.max_norm = self._half_norm if fixed else total_norm
        self._turn = 0
        self._halved = [False] * len(lists)

    @property
    def gradients(self) -> list[torch.Tensor]:
        """Return those of the list whose turn it is."""
        return gradients(self.lists[self._turn])

    def prepare(self) -> None:
        """Turn to the next list and make the call that follows like the others; not to be timed."""
        self._turn = (self._turn + 1) % len(self.lists)
        if self.mode != "active":
            return
        if self.fixed:
            if self._halved[self._turn]:
                torch._foreach_mul_(self.gradients, 2.0)
            self._halved[self._turn] = False
            return
        if self.max_norm < self._half_norm:
            torch._foreach_mul_(self.gradients, 2.0)
            self.max_norm *= 2
        self.max_norm *= 1 - self.SHRINK

    def call(self, peer: Peer) -> Call:
        """Return what is timed for one peer."""
        if self.mode == "norm":
            return self._in_turn([partial(peer.norm, gradients(parameters)) for parameters in self.lists])
        return self.clipping(peer.clip)

    def clipping(self, clip: Callable[[list[Parameter], float], object]) -> Call:
        """Return the call of what takes parameters and threshold, and scales the gradients."""
        return self._in_turn([partial(self._clip, clip, parameters) for parameters in self.lists])

    def _clip(self, clip: Callable[[list[Parameter], float], object], parameters: list[Parameter]) -> object:
        return clip(parameters, self.max_norm)

    def captured(self, peer: Peer, device: Cuda) -> Call:
        """Return the replays of one peer's clips, each captured in a graph."""
        replays = {}
        for _ in self.lists:
            self.prepare()
            clip = partial(peer.clip, self.lists[self._turn], self.max_norm)
            replays[self._turn], _ = device.capture(clip)
            self._halved[self._turn] = True
        return self._in_turn(replays)

    def _in_turn(self, calls: Sequence[Call] | Mapping[int, Call]) -> Call:
        def call() -> object:
            self._halved[self._turn] = True
            return calls[self._turn]()

        return call
