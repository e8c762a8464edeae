"""The implementations that are timed beside each other."""

from __future__ import annotations

import contextvars
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

import fastclip
from fastclip import backends
from fastclip.bench.models import gradients


@dataclass(frozen=True)
class Peer:
    """One implementation of clipping by norm.

    Attributes:
        name: Key in tables and files.
        title: What readers see.
        clip: (parameters, max_norm) -> total norm before clipping; scales the gradients in place.
        norm: (gradients) -> total norm.
    """

    name: str
    title: str
    clip: Callable[[list[torch.nn.Parameter], float], torch.Tensor]
    norm: Callable[[list[torch.Tensor]], torch.Tensor]


def torch_peer(name: str, title: str, *, foreach: bool) -> Peer:
    """Return torch's own clipping with one choice of `foreach`."""
    return Peer(name, title, partial(_torch_clip, foreach=foreach), partial(_torch_norm, foreach=foreach))


# At the top level, so that a peer can be sent to the process that times it.
def _torch_clip(parameters: list[torch.nn.Parameter], max_norm: float, *, foreach: bool) -> torch.Tensor:
    return torch.nn.utils.clip_grad_norm_(parameters, max_norm, foreach=foreach)


def _torch_norm(gradients: list[torch.Tensor], *, foreach: bool) -> torch.Tensor:
    return torch.nn.utils.get_total_norm(gradients, foreach=foreach)


FASTCLIP = Peer("fastclip", "fastclip", fastclip.clip_grad_norm_, fastclip.get_total_norm)
FOREACH = torch_peer("torch_foreach", "torch foreach", foreach=True)
LOOP = torch_peer("torch_loop", "torch loop", foreach=False)

# The subject of the comparison comes first, the peer that its ratio is quoted against second.
PEERS = (FASTCLIP, FOREACH, LOOP)


def fastclip_peer(backend: str) -> Peer:
    """Return fastclip with one backend."""
    clip, norm = within(backend, fastclip.clip_grad_norm_), within(backend, fastclip.get_total_norm)
    return Peer(backend, f"fastclip {backend}", clip, norm)


def within(backend: str | None, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function with one backend in force, chosen once and not at every call; None leaves it open."""
    if backend is None:
        return function
    context = contextvars.copy_context()
    context.run(backends.choose, backend)
    return lambda *arguments: context.run(function, *arguments)


def device_backends(device: torch.device) -> list[str]:
    """Return fastclip's backends that run kernels on a device: whichever are there, best first.

    Raises:
        RuntimeError: There is none; says why.
    """
    if device.type == "cpu":
        return ["cpu"]
    info = {name: found for name, found in fastclip.backend_info().items() if name not in ("cpu", "eager")}
    names = [name for name, found in info.items() if found.available]
    if not names:
        reasons = "; ".join(f"{name}: {found.reason}" for name, found in info.items())
        raise RuntimeError(f"no backend of fastclip runs on {device}: {reasons}.")
    return names


MULTI_TENSOR_MODULES = {
    "apex": ("Apex", "amp_C"),
    "transformer_engine": ("TransformerEngine", "transformer_engine_torch"),
}
"""Name -> title, and the module with its `multi_tensor_l2norm` and `multi_tensor_scale`."""
MULTI_TENSOR_CHUNK = 65_536

# A loop over tensors makes a graph of thousands of nodes; the others ask the device for a number.
NOT_CAPTURED = ("torch_loop", "torch_compile", *MULTI_TENSOR_MODULES)


def multi_tensor_peers(device: torch.device) -> tuple[list[Peer], dict[str, str]]:
    """Return those of Apex and TransformerEngine that are installed, and why the others are absent."""
    peers, absent = [], {}
    for name, (title, module) in MULTI_TENSOR_MODULES.items():
        if device.type == "cpu" or importlib.util.find_spec(module) is None:
            absent[name] = f"{module} is not installed"
            continue
        # Its library is linked to torch's, and does not load beside every torch.
        try:
            peers.append(_multi_tensor_peer(name, title, importlib.import_module(module), device))
        except ImportError as error:
            absent[name] = f"{module} does not load: {error}"
    return peers, absent


def _multi_tensor_peer(name: str, title: str, module: Any, device: torch.device) -> Peer:
    """Return clipping as apex.contrib.clip_grad does it: the kernel takes the factor as the host's float."""
    overflow = torch.zeros(1, dtype=torch.int, device=device)

    def norm(gradients: list[torch.Tensor]) -> torch.Tensor:
        norms = [
            module.multi_tensor_l2norm(MULTI_TENSOR_CHUNK, overflow, [alike], False)[0].float()
            for alike in _by_dtype(gradients)
        ]
        total_norm: torch.Tensor = torch.linalg.vector_norm(torch.cat(norms))
        return total_norm

    def clip(parameters: list[torch.nn.Parameter], max_norm: float) -> torch.Tensor:
        listed = gradients(parameters)
        total_norm = norm(listed)
        factor = float(torch.clamp(max_norm / (total_norm + 1e-6), max=1.0))
        for alike in _by_dtype(listed):
            module.multi_tensor_scale(MULTI_TENSOR_CHUNK, overflow, [alike, alike], factor)
        return total_norm

    return Peer(name, title, clip, norm)


def _by_dtype(gradients: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    alike: dict[torch.dtype, list[torch.Tensor]] = {}
    for gradient in gradients:
        alike.setdefault(gradient.dtype, []).append(gradient)
    return list(alike.values())


def compiled_peer() -> Peer:
    """Return torch's clip as torch.compile makes it."""

    def clip(gradients: list[torch.Tensor], max_norm: float) -> torch.Tensor:
        norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
        torch._foreach_mul_(gradients, torch.clamp(max_norm / (norm + 1e-6), max=1.0))
        return norm

    compiled = torch.compile(clip)
    norm = torch.compile(lambda gradients: torch.nn.utils.get_total_norm(gradients, foreach=True))
    return Peer(
        "torch_compile", "torch.compile", lambda ps, max_norm: compiled(gradients(ps), max_norm), norm
    )
