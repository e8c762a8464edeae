"""fastclip's backends, and the peers that they are timed beside."""

from __future__ import annotations

import contextvars
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import fastclip
from fastclip import backends
from fastclip.bench.peers import Peer, torch_peer
from gpu_suite.device import Device


def backend_names(device: Device) -> list[str]:
    """Return fastclip's backends that run kernels on the device: whichever are there.

    Raises:
        SystemExit: There is none; says why.
    """
    if not device.is_accelerator:
        return ["cpu"]
    info = fastclip.backend_info()
    names = [name for name in backends.NAMES if name not in ("cpu", "eager") and info[name].available]
    if not names:
        reasons = "; ".join(f"{name}: {info[name].reason}" for name in info if name not in ("cpu", "eager"))
        raise SystemExit(f"gpu.py: no backend of fastclip runs on {device.torch_device}: {reasons}.")
    return names


def fastclip_peer(backend: str) -> Peer:
    """Return fastclip with one backend, chosen once and not at every call."""
    return Peer(
        backend,
        f"fastclip {backend}",
        within(backend, fastclip.clip_grad_norm_),
        within(backend, fastclip.get_total_norm),
    )


def within(backend: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function with one backend in force, chosen once and not at every call."""
    context = contextvars.copy_context()
    context.run(backends.choose, backend)
    return lambda *args: context.run(function, *args)


def torch_peers() -> list[Peer]:
    """Return torch's two ways."""
    return [
        torch_peer("torch_foreach", "torch foreach", foreach=True),
        torch_peer("torch_loop", "torch loop", foreach=False),
    ]


MULTI_TENSOR_MODULES = {
    "apex": ("Apex", "amp_C"),
    "transformer_engine": ("TransformerEngine", "transformer_engine_torch"),
}
"""Name -> title, and the module with its `multi_tensor_l2norm` and `multi_tensor_scale`."""
MULTI_TENSOR_CHUNK = 65_536


def multi_tensor_peers(device: Device) -> tuple[list[Peer], dict[str, str]]:
    """Return those of Apex and TransformerEngine that are installed, and why the others are absent."""
    peers, absent = [], {}
    for name, (title, module) in MULTI_TENSOR_MODULES.items():
        if not device.is_accelerator or importlib.util.find_spec(module) is None:
            absent[name] = f"{module} is not installed"
            continue
        # Its library is linked to torch's, and does not load beside every torch.
        try:
            peers.append(_multi_tensor_peer(name, title, importlib.import_module(module), device))
        except ImportError as error:
            absent[name] = f"{module} does not load: {error}"
    return peers, absent


def _multi_tensor_peer(name: str, title: str, module: Any, device: Device) -> Peer:
    """Return clipping as apex.contrib.clip_grad does it: the kernel takes the factor as the host's float."""
    overflow = torch.zeros(1, dtype=torch.int, device=device.torch_device)

    def norm(gradients: list[Tensor]) -> Tensor:
        norms = [
            module.multi_tensor_l2norm(MULTI_TENSOR_CHUNK, overflow, [alike], False)[0].float()
            for alike in _by_dtype(gradients)
        ]
        return torch.linalg.vector_norm(torch.cat(norms))

    def clip(parameters: list[torch.nn.Parameter], max_norm: float) -> Tensor:
        gradients = [p.grad for p in parameters if p.grad is not None]
        total_norm = norm(gradients)
        factor = float(torch.clamp(max_norm / (total_norm + 1e-6), max=1.0))
        for alike in _by_dtype(gradients):
            module.multi_tensor_scale(MULTI_TENSOR_CHUNK, overflow, [alike, alike], factor)
        return total_norm

    return Peer(name, title, clip, norm)


def _by_dtype(gradients: list[Tensor]) -> list[list[Tensor]]:
    alike: dict[torch.dtype, list[Tensor]] = {}
    for gradient in gradients:
        alike.setdefault(gradient.dtype, []).append(gradient)
    return list(alike.values())


def compiled_peer() -> Peer:
    """Return torch's clip as torch.compile makes it."""

    def clip(gradients: list[Tensor], max_norm: float) -> Tensor:
        norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
        torch._foreach_mul_(gradients, torch.clamp(max_norm / (norm + 1e-6), max=1.0))
        return norm

    compiled = torch.compile(clip)
    norm = torch.compile(lambda gradients: torch.nn.utils.get_total_norm(gradients, foreach=True))

    def clip_parameters(parameters: list[torch.nn.Parameter], max_norm: float) -> Tensor:
        result: Tensor = compiled([p.grad for p in parameters], max_norm)
        return result

    return Peer("torch_compile", "torch.compile", clip_parameters, norm)


def captured_clip(
    peer: Peer, parameters: Sequence[torch.nn.Parameter], max_norm: float
) -> tuple[Callable[[], None], Tensor]:
    """Return the replay of a CUDA graph of one clip, and its norm, which callers read after a replay."""
    listed = list(parameters)
    return captured(lambda: peer.clip(listed, max_norm))


def captured(call: Callable[[], Any], *, warm_up: bool = True) -> tuple[Callable[[], None], Any]:
    """Return the replay of a CUDA graph of one call, and what it returned, whose memory is the graph's.

    Runs the call once on a side stream before, as torch asks, unless the caller has done so.
    """
    if warm_up:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call()
        torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph.replay, result
