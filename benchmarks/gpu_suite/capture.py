"""CUDA graphs: a clip is captured once and replayed while the gradients change."""

from __future__ import annotations

import torch
from torch import Tensor

from fastclip.bench.peers import Peer
from gpu_suite.device import Device
from gpu_suite.subjects import captured_clip
from gpu_suite.workloads import parameter_of

MAX_NORM = 1.0


def check_capture(device: Device, peer: Peer) -> dict[str, int]:
    """Replay clips of few and many tensors, with gradients above and below the threshold, beside calls.

    Raises:
        AssertionError: A replay gave other bits than a call.
    """
    num_replays = 0
    for num_tensors in (1, 40, 2000):
        shapes = [(7 + i % 90,) for i in range(num_tensors)]
        dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
        grads = [
            torch.zeros(shape, dtype=dtypes[i % 4], device=device.torch_device)
            for i, shape in enumerate(shapes)
        ]
        replay, norm = captured_clip(peer, [parameter_of(g) for g in grads], MAX_NORM)
        for seed, magnitude in enumerate((1.0, 1e-6, 3.0, 1e-6, 1e-3)):
            values = _values(grads, seed, magnitude)
            for grad, value in zip(grads, values, strict=True):
                grad.copy_(value)
            replay()
            expected = peer.clip([parameter_of(v) for v in values], MAX_NORM)
            assert torch.equal(norm, expected), (
                f"{num_tensors} tensors: norm {norm.item()}, {expected.item()}"
            )
            for position, (grad, value) in enumerate(zip(grads, values, strict=True)):
                assert torch.equal(grad, value), (
                    f"gradient {position} of {num_tensors} differs after a replay"
                )
            num_replays += 1
    return {"replays": num_replays}


def _values(grads: list[Tensor], seed: int, magnitude: float) -> list[Tensor]:
    generator = torch.Generator(grads[0].device).manual_seed(seed)
    return [torch.empty_like(g).normal_(generator=generator).mul_(magnitude) for g in grads]
