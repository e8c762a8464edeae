"""The implementations that are timed beside each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

import fastclip


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
