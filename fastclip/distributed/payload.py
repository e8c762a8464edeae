"""What ranks send each other: a few float64, whose number depends on p alone.

The norm of a part is raised to the power p and added up. So that no power leaves the range of a float64, the
sums stand in slots: slot j holds parts whose norm is near 2^(j * width), divided by that (after Blue, A
portable Fortran program to find the Euclidean norm of a vector, 1978, who has three). One more number is nan
or inf if a part is, and one counts what a GradScaler has found. For the inf-norm there are the largest
magnitude, a flag for nan, which a reduction by MAX may drop, and the count.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

LARGEST_P = 4.0
"""Above it the slots that 64 bytes have room for do not span a float64."""

# log2 of the largest power that a slot holds: 2^123 of them can be added up.
_SLOT_EXPONENT = 900.0


@functools.lru_cache(maxsize=256)
def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return numbers as a tensor that nobody may change, copied to a device once and not in every step."""
    return torch.tensor(values, dtype=dtype, device="cpu").to(device)


@dataclass(frozen=True)
class Encoding:
    """How parts of a p-norm are written down, for 0 < p <= LARGEST_P or p = inf.

    Attributes:
        p: The order of the norm.
        scales: log2 of what each slot is divided by.
    """

    p: float
    scales: tuple[float, ...]

    @classmethod
    def of(cls, p: float) -> Encoding:
        """Return the encoding for one p."""
        if math.isinf(p) or p <= 1:
            return cls(p, (0.0,))  # no power of a float64 leaves its range
        width = 2 * _SLOT_EXPONENT / p
        reach = math.ceil((1100 - width / 2) / width)
        return cls(p, tuple(width * j for j in range(-reach, reach + 1)))

    @property
    def op(self) -> dist.ReduceOp.RedOpType:
        """How payloads are reduced."""
        return dist.ReduceOp.MAX if math.isinf(self.p) else dist.ReduceOp.SUM

    def encode(self, norms: Tensor, weights: Tensor, found: Tensor | None) -> Tensor:
        """Return the payload of parts, 1-dim float64.

        Args:
            norms: Of k parts; float64.
            weights: What each counts; float64.
            found: Whether something else than a part is not finite; 0-dim.
        """
        if self._on_host(norms) and len(self.scales) > 1:
            number = 0.0 if found is None else float(found)
            return norms.new_tensor(self._encode_numbers(norms.tolist(), weights.tolist(), number))
        count = norms.new_zeros(1) if found is None else found.to(norms.device, norms.dtype).reshape(1)
        if math.isinf(self.p):
            counted = torch.where(weights > 0, norms, 0.0)
            flags = counted.isnan().to(norms.dtype)
            largest = torch.cat((counted.nan_to_num(0.0, math.inf), norms.new_zeros(1))).max()
            return torch.cat((largest.reshape(1), flags.sum().reshape(1), count))
        finite = norms.isfinite()
        kept = torch.where(finite, norms, 0.0)
        nonfinite = torch.where(finite | (weights == 0), 0.0, norms).sum().reshape(1)
        if len(self.scales) == 1:
            return torch.cat(((kept**self.p * weights).sum().reshape(1), nonfinite, count))
        scales = constant(self.scales, norms.dtype, norms.device)
        width = self.scales[1] - self.scales[0]
        slot = (kept.log2() / width).round().clamp(-(len(self.scales) // 2), len(self.scales) // 2)
        # In halves: a scale itself can be out of range where the product is not.
        half = torch.exp2(-slot * width / 2)
        scaled = (kept * half * half) ** self.p * weights
        sums = torch.where(slot * width == scales.unsqueeze(1), scaled, 0.0).sum(1)
        return torch.cat((sums, nonfinite, count))

    @staticmethod
    def _on_host(numbers: Tensor) -> bool:
        return numbers.device.type == "cpu"

    def _encode_numbers(self, norms: list[float], weights: list[float], found: float) -> list[float]:
        """Do the same on the host, where that is quicker than a dozen operations on a few numbers."""
        sums, nonfinite = [0.0] * len(self.scales), 0.0
        width = self.scales[1] - self.scales[0]
        reach = len(self.scales) // 2
        for norm, weight in zip(norms, weights, strict=True):
            if not math.isfinite(norm):
                nonfinite += norm if weight else 0.0
            elif norm:
                slot = max(-reach, min(reach, round(math.log2(norm) / width)))
                half = 2.0 ** (-slot * width / 2)
                sums[slot + reach] += (norm * half * half) ** self.p * weight
        return [*sums, nonfinite, found]

    def _decode_numbers(self, payload: list[float]) -> float:
        norms: list[float] = []
        for total, scale in zip(payload[:-2], self.scales, strict=True):
            root = math.sqrt(total) if self.p == 2 else total ** (1 / self.p)
            half = 2.0 ** (scale / 2)
            norms.append(root * half * half)
        present = [norm for norm in norms if norm]
        if len(present) < 2:
            return sum(present) + payload[-2]
        largest = max(present)
        if math.isinf(largest):
            return math.inf + payload[-2]
        total = math.fsum((norm / largest) ** self.p for norm in present)
        return float(total ** (1 / self.p)) * largest + payload[-2]

    def merge(self, payloads: list[Tensor]) -> Tensor:
        """Return the payload of all parts together."""
        stacked = torch.stack(payloads)
        return stacked.amax(0) if math.isinf(self.p) else stacked.sum(0)

    def flags_of(self, payload: Tensor) -> Tensor:
        """Return a payload that says no more than what is not finite."""
        flags = payload.clone()
        if math.isinf(self.p):
            flags[0] = torch.where(payload[0].isinf(), payload[0], 0.0)
        else:
            flags[:-2] = 0.0
        return flags

    def decode(self, payload: Tensor) -> Tensor:
        """Return the norm of all parts, 0-dim float64."""
        if math.isinf(self.p):
            return torch.where(payload[1] > 0, math.nan, payload[0])
        if self._on_host(payload):
            return payload.new_tensor(self._decode_numbers(payload.tolist()))
        sums, nonfinite = payload[:-2], payload[-2]
        norms = sums.sqrt() if self.p == 2 else sums ** (1 / self.p)
        if len(self.scales) == 1:
            return norms[0] + nonfinite
        half = torch.exp2(constant(self.scales, payload.dtype, payload.device) / 2)
        norms = norms * half * half
        largest = norms.max()
        divisor = torch.where((largest > 0) & largest.isfinite(), largest, 1.0)
        total: Tensor = torch.linalg.vector_norm(norms / divisor, self.p) * divisor
        return total + nonfinite
