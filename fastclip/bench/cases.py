"""What is timed: a workload, a dtype and a mode, the thresholds of its calls and the bytes that must move."""

from __future__ import annotations

from dataclasses import dataclass

import torch

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
    def traffic(self) -> Traffic:
        """Return the byte model: N = numel * itemsize to read, 2 N more where gradients are scaled."""
        nbytes = self.workload.numel * DTYPES[self.dtype].itemsize
        return Traffic(nbytes, 2 * nbytes if self.mode == "active" else 0)


class Clipping:
    """The threshold of each call, chosen so that call after call does the same work.

    Gradients that were clipped stay clipped, so a fixed threshold would be active once only. In `active`
    mode each call's threshold therefore lies SHRINK below the one before. That is more than the largest
    error of any peer (about 0.8 %: a bfloat16 norm and a bfloat16 coefficient), so the coefficient is
    below 1 in every call, and the same for all peers. Gradients that have lost half of their norm are
    doubled, which is exact, between two calls and outside the timing: they never come near the
    subnormal numbers.
    """

    SHRINK = 0.02

    def __init__(self, parameters: list[torch.nn.Parameter], mode: str, total_norm: float) -> None:
        """Take the parameters and the true norm of their gradients."""
        self.parameters = parameters
        self.gradients = gradients(parameters)
        self.mode = mode
        self.max_norm = total_norm if mode == "active" else 1e3 * total_norm
        self._half_norm = total_norm / 2

    def next_threshold(self) -> None:
        """Set the threshold of the call that follows; not to be timed."""
        if self.mode != "active":
            return
        if self.max_norm < self._half_norm:
            torch._foreach_mul_(self.gradients, 2.0)
            self.max_norm *= 2
        self.max_norm *= 1 - self.SHRINK

    def call(self, peer: Peer) -> Call:
        """Return what is timed for one peer."""
        if self.mode == "norm":
            return lambda: peer.norm(self.gradients)
        return lambda: peer.clip(self.parameters, self.max_norm)
