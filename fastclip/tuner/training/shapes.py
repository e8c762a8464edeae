"""How outputs and targets fit together: one reading for the loss, the metrics and the guess."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import torch


def equal_but_for_ones(outputs: torch.Size, targets: torch.Size) -> bool:
    """Return whether there is one number for each target, in the same order."""
    return outputs[:1] == targets[:1] and [n for n in outputs[1:] if n != 1] == [
        n for n in targets[1:] if n != 1
    ]


def matched(outputs: torch.Tensor, targets: torch.Tensor, caller: str) -> torch.Tensor:
    """Return outputs in the shape of their targets; raise ValueError unless only dimensions of 1 differ."""
    if not equal_but_for_ones(outputs.shape, targets.shape):
        raise ValueError(
            f"{caller}: outputs of shape {tuple(outputs.shape)} for targets of shape "
            f"{tuple(targets.shape)}; expected the same, up to dimensions of size 1."
        )
    return outputs.reshape(targets.shape)


def is_multi_label(outputs: torch.Size, targets: torch.Size) -> bool:
    """Return whether each sample has several labels that are there or not, with a logit for each."""
    return len(targets) == 2 and targets[1] > 1 and equal_but_for_ones(outputs, targets)


def class_dim(outputs: torch.Size, targets: torch.Size, *, last: bool) -> int | None:
    """Return the dimension of the class scores, or None where there is none.

    Args:
        outputs: Targets' shape with one dimension more: behind the batch as torch's cross-entropy has it,
            (n, classes, ...), or at the end, (n, ..., classes).
        targets: Shape of the targets, (n, ...).
        last: Whether it is the one at the end where both would fit, as `default_loss` has it.
    """
    fits_last = outputs[:-1] == targets
    fits_second = len(outputs) > 1 and outputs[:1] + outputs[2:] == targets
    if fits_last and (last or not fits_second):
        return len(outputs) - 1
    return 1 if fits_second else None


def class_scores(
    outputs: torch.Tensor, targets: torch.Tensor, classes: npt.NDArray[Any], *, last: bool
) -> torch.Tensor:
    """Return one row of class scores for each target, in the order of the flattened targets.

    Args:
        outputs: As `class_dim` takes them; or one logit for each target, with or without a dimension of
            size 1, for the classes 0 and 1.
        targets: Classes, of shape (n, ...).
        classes: Those that occur.
        last: As for `class_dim`.

    Raises:
        ValueError: Neither fits, or there are fewer scores than classes, of which the message names the
            shapes; or a class is negative.
    """
    if equal_but_for_ones(outputs.shape, targets.shape):
        if set(classes.tolist()) <= {0, 1}:
            logits = outputs.reshape(-1)
            return torch.stack((torch.zeros_like(logits), logits), dim=-1)
        raise ValueError(
            f"class_scores: outputs of shape {tuple(outputs.shape)} hold one number for each target, and the "
            f"classes are {classes.tolist()}; expected 0 and 1, or a score for each class."
        )
    dim = class_dim(outputs.shape, targets.shape, last=last)
    if dim is None:
        raise _misfit("class_scores", outputs, targets)
    if min(classes.tolist()) < 0:
        raise ValueError(
            f"class_scores: the smallest class is {min(classes.tolist())}; expected 0 or above. Number them "
            "from 0, give them as names, or take TunerClassifier, whose classes may be any numbers."
        )
    if outputs.shape[dim] <= max(classes.tolist()):
        raise ValueError(
            f"class_scores: outputs of shape {tuple(outputs.shape)} hold {outputs.shape[dim]} scores for "
            f"each target, and the largest class is {max(classes.tolist())}; expected more scores than that. "
            "Targets that do not count are named by the ignore_index of torch.nn.CrossEntropyLoss."
        )
    return class_rows(outputs, dim)


def class_rows(outputs: torch.Tensor, dim: int) -> torch.Tensor:
    """Return one row of class scores for each target, the scores being in dimension dim."""
    return outputs.movedim(dim, -1).reshape(-1, outputs.shape[dim])


def scores_dim(outputs: torch.Tensor, targets: torch.Tensor, caller: str) -> int:
    """Return the dimension of the class scores, at the end where both would fit.

    Raises:
        ValueError: there is none; the message names both shapes.
    """
    dim = class_dim(outputs.shape, targets.shape, last=True)
    if dim is None:
        raise _misfit(caller, outputs, targets)
    return dim


def _misfit(caller: str, outputs: torch.Tensor, targets: torch.Tensor) -> ValueError:
    shape = tuple(targets.shape)
    return ValueError(
        f"{caller}: outputs of shape {tuple(outputs.shape)} for targets of shape {shape}; "
        f"expected {(*shape[:1], 'classes', *shape[1:])} or {(*shape, 'classes')}."
    )
