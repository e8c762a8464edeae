"""Initialise any model by name, from torch.nn.init where the method exists there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from fastclip.tuner.training.stepping import call

NORMALISATIONS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
)
MIN_LSUV_STD = 1e-8


def _kaiming(method: Callable[..., torch.Tensor]) -> Callable[[torch.Tensor, float], torch.Tensor]:
    def fill(weight: torch.Tensor, gain: float) -> torch.Tensor:
        return method(weight, nonlinearity="relu").mul_(gain)

    return fill


INITS: dict[str, Callable[[torch.Tensor, float], Any]] = {
    "xavier_uniform": nn.init.xavier_uniform_,
    "xavier_normal": nn.init.xavier_normal_,
    "kaiming_uniform": _kaiming(nn.init.kaiming_uniform_),
    "kaiming_normal": _kaiming(nn.init.kaiming_normal_),
    "orthogonal": nn.init.orthogonal_,
    "lsuv": nn.init.orthogonal_,
}
INIT_NAMES = ("default", *INITS)


@torch.no_grad()
def initialise(model: nn.Module, init: str = "default", gain: float = 1.0, batch: Any = None) -> nn.Module:
    """Initialise weights in place and set the biases beside them to zero.

    Every parameter with two or more dimensions is a weight, except those of embeddings and of
    normalisation layers, which keep what their constructor gave.

    Args:
        model: Any module; "default" leaves it as its constructor made it.
        init: One of `INIT_NAMES`.
        gain: Factor on the weights; for "lsuv" the standard deviation asked of each layer's output.
        batch: Inputs of a mini-batch for "lsuv": a tensor, a tuple of arguments, or a dict of keyword
            arguments.

    Returns:
        The model.

    Raises:
        ValueError: unknown name, "lsuv" without a batch, or a gain for "default".

    Source:
        LSUV: Mishkin and Matas, All you need is a good init, ICLR 2016 (orthogonal, then each layer in
        the order of execution divided by the standard deviation of its output).
    """
    if init not in INIT_NAMES:
        raise ValueError(f"initialise: init={init!r} is unknown; expected one of {', '.join(INIT_NAMES)}.")
    if init == "default":
        if gain != 1.0:
            raise ValueError(
                f"initialise: gain={gain} with init='default', which leaves the weights alone; expected "
                f"another init: {', '.join(INITS)}."
            )
        return model
    if init == "lsuv" and batch is None:
        raise ValueError("initialise: init='lsuv' needs batch; expected the inputs of one mini-batch.")
    fill_gain = 1.0 if init == "lsuv" else gain
    for module, weights in _weights(model):
        for weight in weights:
            INITS[init](weight, fill_gain)
        for parameter in module.parameters(recurse=False):
            if parameter.ndim == 1:
                parameter.zero_()
    if init == "lsuv":
        _scale_outputs(model, batch, gain)
    return model


def _weights(model: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Parameter]]]:
    for module in model.modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag, *NORMALISATIONS)):
            continue
        weights = [p for p in module.parameters(recurse=False) if p.ndim >= 2]
        if weights:
            yield module, weights


def _scale_outputs(model: nn.Module, batch: Any, target_std: float) -> None:
    """Divide the weights of each linear or convolutional layer by its output's deviation, first layer first.

    One forward pass does them all: a hook scales a layer and hands the scaled output on, so that the next
    layer sees what it will see after the call.
    """

    def scale(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        del inputs
        std = output.std().item()
        if std < MIN_LSUV_STD:  # a dead layer: no scale would revive it
            return output
        module.weight.mul_(target_std / std)  # type: ignore[operator]
        return output * (target_std / std)

    was_training = model.training
    layers = (nn.Linear, nn.modules.conv._ConvNd)
    handles = [m.register_forward_hook(scale) for m in model.modules() if isinstance(m, layers)]
    try:
        model.eval()
        call(model, tuple(batch) if isinstance(batch, list) else batch)
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)
