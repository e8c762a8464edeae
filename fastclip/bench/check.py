"""Correctness against float64, settled before anything is timed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastclip import reference
from fastclip.bench.cases import DTYPES
from fastclip.bench.models import SEED, Workload, gradients
from fastclip.bench.peers import Peer

# The running sums that a long tensor is spread over; each sees this share of the additions.
NUM_LANES = 32

# Elements looked at together: their float64 copies stay in the second-level cache, and torch opens no
# parallel region for so few, which on a busy machine costs far more than it gains.
BLOCK_NUMEL = 1 << 15


class CheckError(Exception):
    """The implementation under test gave a wrong answer; no timing of it means anything."""


@dataclass(frozen=True)
class Check:
    """What the check of one workload in one dtype found.

    Attributes:
        total_norm: In float64 arithmetic.
        relative_errors: Peer -> |norm - total_norm| / total_norm.
    """

    workload: Workload
    dtype: str
    total_norm: float
    relative_errors: dict[str, float]

    def __str__(self) -> str:
        """Return one line for a log."""
        errors = ", ".join(f"{name} {error:.1e}" for name, error in self.relative_errors.items())
        return f"{self.workload.name} {self.dtype}: relative error of the norm: {errors}"


def check(workload: Workload, dtype: str, peers: Sequence[Peer], *, seed: int = SEED) -> Check:
    """Compare every peer's norm with float64, and the first peer's clipping element by element.

    Needs memory for two copies of the gradients.

    Args:
        workload: Shapes of the gradients.
        dtype: A key of DTYPES.
        peers: The first one is under test; of the others the error is reported and not judged.
        seed: Of the gradients.

    Raises:
        CheckError: The first peer's norm, an unclipped or a clipped gradient is wrong.
    """
    where = f"{workload.name} {dtype}"
    subject = peers[0]
    parameters = workload.parameters(DTYPES[dtype], seed=seed)
    grads = gradients(parameters)
    expected = math.hypot(*(reference.total_norm([block]) for grad in grads for block in _blocks(grad)))
    tolerance = norm_tolerance(workload, DTYPES[dtype])
    norms = {peer.name: float(peer.norm(grads)) for peer in peers}
    errors = {name: abs(norm - expected) / expected for name, norm in norms.items()}

    def require(what: str, norm: float) -> None:
        error = abs(norm - expected) / expected
        if not error <= tolerance:
            raise CheckError(
                f"{where}: {what} by {subject.name} is {norm!r}; expected {expected!r} within "
                f"{tolerance:.2g}. Its relative error is {error:.2g}."
            )

    require("the norm", norms[subject.name])
    originals = [grad.clone() for grad in grads]
    require("the norm returned by an inactive clip", float(subject.clip(parameters, 2.0 * expected)))
    for index, (grad, original) in enumerate(zip(grads, originals, strict=True)):
        if not torch.equal(grad, original):
            raise CheckError(
                f"{where}: {subject.name} changed gradient {index} though the threshold is above the norm; "
                f"expected the same bits."
            )
    max_norm = 0.7 * expected
    require("the norm returned by an active clip", float(subject.clip(parameters, max_norm)))
    clip_coef = max_norm / (expected + 1e-6)
    for index, (grad, original) in enumerate(zip(grads, originals, strict=True)):
        error = _scaling_error(grad, original, clip_coef, tolerance)
        if not error <= 1.0:
            raise CheckError(
                f"{where}: {subject.name} scaled gradient {index} wrongly, {error:.3g} times as far off as "
                f"rounding explains; expected every element times {clip_coef:.6g}."
            )
    return Check(workload, dtype, expected, errors)


def norm_tolerance(workload: Workload, dtype: torch.dtype) -> float:
    """Return the relative error that roundings alone can cause in a norm.

    Squares are added in float64: as many additions as one lane sees, one per lane and one per tensor. The
    root halves their error. The result is rounded once, to float64 for float64 and to float32 for
    everything narrower.

    Source:
        Higham, Accuracy and Stability of Numerical Algorithms, ch. 4: n additions of positive numbers
        err by at most n units of roundoff.
    """
    num_roundings = 1 + workload.numel / NUM_LANES + NUM_LANES + workload.num_tensors
    return num_roundings / 2 * _unit_roundoff(torch.float64) + _unit_roundoff(_result_dtype(dtype))


def _scaling_error(
    grad: torch.Tensor, original: torch.Tensor, clip_coef: float, norm_tolerance: float
) -> float:
    """Return the largest error of an element, in units of what rounding allows; nan if one is nan."""
    # Sum, quotient and coefficient in the type of the norm, the product there too, then the element's own.
    relative = norm_tolerance + 4 * _unit_roundoff(_result_dtype(grad.dtype)) + _unit_roundoff(grad.dtype)
    smallest = torch.finfo(grad.dtype).smallest_normal * torch.finfo(grad.dtype).eps
    worst = []
    for got, before in zip(_blocks(grad), _blocks(original), strict=True):
        wanted = before.double().mul_(clip_coef)
        allowed = wanted.abs().mul_(relative).add_(smallest)
        worst.append(wanted.sub_(got.double()).abs_().div_(allowed).max())
    return float(torch.stack(worst).max())


def _blocks(tensor: torch.Tensor) -> Sequence[torch.Tensor]:
    """Return views of at most BLOCK_NUMEL consecutive elements each, of a contiguous tensor."""
    return torch.split(tensor.view(-1), BLOCK_NUMEL)


def _result_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2
