"""Correctness against float64, settled before anything is timed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from fastclip.bench.cases import dtypes_of
from fastclip.bench.devices import CPU, Cuda, Device
from fastclip.bench.models import SEED, Workload, gradients
from fastclip.bench.peers import Peer

# The running sums that a long tensor is spread over; each sees this share of the additions.
NUM_LANES = 32

# Roundings in float32 that follow each other before a kernel on a GPU widens its sum.
ROUNDINGS_IN_A_ROW = 8


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


def check(
    workload: Workload, dtype: str, peers: Sequence[Peer], *, device: Device = CPU, seed: int = SEED
) -> Check:
    """Compare every peer's norm with float64, and the first peer's clipping element by element.

    Needs memory for two copies of the gradients.

    Args:
        workload: Shapes of the gradients.
        dtype: As in `dtypes_of`.
        peers: The first one is under test; of the others the error is reported and not judged.
        device: Where the gradients live.
        seed: Of the gradients.

    Raises:
        CheckError: The first peer's norm, an unclipped or a clipped gradient is wrong.
    """
    where = f"{workload.name} {dtype}"
    subject = peers[0]
    dtypes = dtypes_of(dtype)
    parameters = workload.parameters(*dtypes, device=device.torch_device, seed=seed)
    grads = gradients(parameters)
    found = compare_norms(workload, dtype, peers, grads, device)
    expected = found.total_norm
    tolerance = max(norm_tolerance(workload, each, device) for each in dtypes)

    def require(what: str, norm: float) -> None:
        error = abs(norm - expected) / expected
        if not error <= tolerance:
            raise CheckError(
                f"{where}: {what} by {subject.name} is {norm!r}; expected {expected!r} within "
                f"{tolerance:.2g}. Its relative error is {error:.2g}."
            )

    require("the norm", float(subject.norm(grads)))
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
        error = _scaling_error(grad, original, clip_coef, tolerance, device)
        if not error <= 1.0:
            raise CheckError(
                f"{where}: {subject.name} scaled gradient {index} wrongly, {error:.3g} times as far off as "
                f"rounding explains; expected every element times {clip_coef:.6g}."
            )
    return found


def compare_norms(
    workload: Workload, dtype: str, peers: Sequence[Peer], grads: list[torch.Tensor], device: Device = CPU
) -> Check:
    """Compare every peer's norm of these gradients with float64, and judge none."""
    expected = float64_norm(grads, device)
    errors = {peer.name: abs(float(peer.norm(grads)) - expected) / expected for peer in peers}
    return Check(workload, dtype, expected, errors)


def captured(peer: Peer, device: Cuda) -> Peer:
    """Return a peer whose clip is the replay of a graph that was captured while all gradients were zero."""

    def clip(parameters: list[torch.nn.Parameter], max_norm: float) -> torch.Tensor:
        grads = gradients(parameters)
        values = [grad.clone() for grad in grads]
        torch._foreach_zero_(grads)
        replay, norm = device.capture(lambda: peer.clip(parameters, max_norm))
        torch._foreach_copy_(grads, values)
        replay()
        result: torch.Tensor = norm
        return result

    return replace(peer, name=f"{peer.name}_graph", clip=clip)


def float64_norm(tensors: Sequence[torch.Tensor], device: Device = CPU) -> float:
    """Return the norm in float64, summed where the tensors are: `reference` would copy them to the host."""
    norms = [
        torch.linalg.vector_norm(block, dtype=torch.float64)
        for tensor in tensors
        for block in _blocks(tensor, device)
    ]
    return float(torch.linalg.vector_norm(torch.stack(norms)))


def norm_tolerance(workload: Workload, dtype: torch.dtype, device: Device = CPU) -> float:
    """Return the relative error that roundings alone can cause in a norm.

    Squares are added in float64: as many additions as one lane sees, one per lane and one per tensor; on a
    GPU a few in float32 come first. The root halves their error. The result is rounded once, to float64 for
    float64 and to float32 for everything narrower.

    Source:
        Higham, Accuracy and Stability of Numerical Algorithms, ch. 4: n additions of positive numbers
        err by at most n units of roundoff.
    """
    num_roundings = 1 + workload.numel / NUM_LANES + NUM_LANES + workload.num_tensors
    num_narrow = ROUNDINGS_IN_A_ROW / 2 if device.is_accelerator else 0
    unit = unit_roundoff(_result_dtype(dtype))
    return num_roundings / 2 * unit_roundoff(torch.float64) + (num_narrow + 1) * unit


def _scaling_error(
    grad: torch.Tensor, original: torch.Tensor, clip_coef: float, norm_tolerance: float, device: Device
) -> float:
    """Return the largest error of an element, in units of what rounding allows; nan if one is nan."""
    # Sum, quotient and coefficient in the type of the norm, the product there too, then the element's own.
    relative = norm_tolerance + 4 * unit_roundoff(_result_dtype(grad.dtype)) + unit_roundoff(grad.dtype)
    smallest = torch.finfo(grad.dtype).smallest_normal * torch.finfo(grad.dtype).eps
    worst = []
    for got, before in zip(_blocks(grad, device), _blocks(original, device), strict=True):
        wanted = before.double().mul_(clip_coef)
        allowed = wanted.abs().mul_(relative).add_(smallest)
        worst.append(wanted.sub_(got.double()).abs_().div_(allowed).max())
    return float(torch.stack(worst).max())


def _blocks(tensor: torch.Tensor, device: Device) -> Sequence[torch.Tensor]:
    """Return views of consecutive elements, as many each as the device looks at together."""
    return torch.split(tensor.view(-1), device.block_numel)


def _result_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def unit_roundoff(dtype: torch.dtype) -> float:
    """Return the largest relative error of one rounding."""
    return torch.finfo(dtype).eps / 2
