"""One tensor with more elements than 32 bits can count."""

from __future__ import annotations

import math
from typing import Any

import torch

from fastclip.bench.peers import Peer
from gpu_suite.device import Device
from gpu_suite.workloads import parameter_of

NUMEL = 2**31 + 12_345
DRY_NUMEL = 2**20 + 12_345


def check_large(device: Device, peer: Peer) -> dict[str, Any]:
    """Clip a bfloat16 tensor that is zero but for elements at both ends and around 2^31.

    Raises:
        AssertionError: The norm or an element is wrong.
    """
    numel = NUMEL if device.is_accelerator else DRY_NUMEL
    if device.free_nbytes() < 2 * numel + 2**28:
        return {"skipped": f"needs {2 * numel + 2**28} bytes of free memory"}
    grad = torch.zeros(numel, dtype=torch.bfloat16, device=device.torch_device)
    places = [0, numel // 2, numel - 12_346, numel - 12_345, numel - 1]
    for place in places:
        grad[place] = 2.0
    expected = 2.0 * math.sqrt(len(places))
    norm = float(peer.clip([parameter_of(grad)], expected / 4))
    assert math.isclose(norm, expected, rel_tol=1e-6), f"norm {norm}; expected {expected}"
    values = [float(grad[place]) for place in places]
    assert values == [0.5] * len(places), f"elements {values}; expected 0.5"
    nonzero = int(torch.count_nonzero(grad))
    assert nonzero == len(places), f"{nonzero} elements are not zero; expected {len(places)}"
    return {"numel": numel}
