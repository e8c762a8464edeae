"""Penalties on the weights and the dropout rate of a model; weight decay is the optimizer's."""

from __future__ import annotations

import torch
from torch import nn


def penalty(model: nn.Module, l1: float = 0.0, l2: float = 0.0) -> torch.Tensor | None:
    """Return l1 * sum |w| + l2 * sum w^2 over the weights, or None when both are zero.

    Weights are the parameters with two or more dimensions: biases and the scales of normalisation layers
    are left alone. Unlike weight decay the penalty is part of the gradient, so clipping sees it.
    """
    if l1 == 0.0 and l2 == 0.0:
        return None
    weights = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    terms = [l1 * w.abs().sum() for w in weights if l1] + [l2 * w.square().sum() for w in weights if l2]
    return torch.stack(terms).sum() if terms else None


def set_dropout(model: nn.Module, rate: float) -> int:
    """Give every dropout layer, attention and the dropout between recurrent layers this rate.

    Returns:
        How many modules drop out: 0 says that the rate means nothing for this model.

    Raises:
        ValueError: the rate is outside [0, 1).
    """
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"set_dropout: rate={rate}; expected a value in [0, 1).")
    num_set = 0
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = rate
        elif isinstance(module, nn.MultiheadAttention) or (
            isinstance(module, nn.RNNBase) and module.num_layers > 1
        ):
            module.dropout = rate
        else:
            continue
        num_set += 1
    return num_set
