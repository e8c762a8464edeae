"""What guessing scores: the level that an explosion is measured from, and the sign of a collapse."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fastclip.tuner.training.batching import Indices
from fastclip.tuner.training.data import TuningData, spread
from fastclip.tuner.training.losses import LossFunction, default_loss
from fastclip.tuner.training.precision import autocast
from fastclip.tuner.training.seeding import seeded
from fastclip.tuner.training.shapes import class_dim, class_scores, equal_but_for_ones
from fastclip.tuner.training.stepping import EpochRecord, call

REFERENCE_SAMPLES = 256
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
UNSEEN_COUNT = 1e-3  # of a class that never occurs, so that its logarithm is finite
AT_GUESSING = 0.98  # of the loss of guessing, from which a loss counts as no better
ROUNDING = 1e-3  # between two orders of summation in float32
CHANCE = 1.645  # standard errors that a guess exceeds its expected accuracy by in one case of twenty


@torch.no_grad()
def untrained_loss(
    model: nn.Module,
    data: TuningData,
    rows: Indices,
    loss: LossFunction,
    device: torch.device,
    amp: str | None = None,
) -> tuple[float, torch.Size]:
    """Measure a model before its first step, on some of the samples that it will be trained on.

    A single mini-batch would do for large batches only: the loss of one sample says little about the model.

    Returns:
        The larger of its loss and the loss of guessing, nan where neither is finite; and the shape of the
        outputs of one sample.

    Raises:
        ValueError: outputs do not fit targets, or the loss of a regression broadcasts (n, 1) against (n,).
    """
    model.eval()
    some = rows[spread(len(rows), REFERENCE_SAMPLES)]
    with seeded(0, device):
        inputs, targets = data.batch(some, device, measured=True)
    with autocast(amp, device):
        outputs = call(model, inputs)
    outputs = outputs if amp is None else outputs.float()
    if data.is_classification:  # before a device is asked for a class that it has no score for
        class_scores(outputs, targets, data.classes, last=loss is default_loss)
    own = float(loss(outputs, targets))
    if targets.is_floating_point():
        _check_broadcast(loss, outputs, targets, own)
    guessed = guess_loss(outputs.shape[1:], data, rows, some, loss)
    finite = [value for value in (own, guessed) if value is not None and math.isfinite(value)]
    return max(finite, default=math.nan), outputs.shape[1:]


@torch.no_grad()
def guess_loss(
    shape: torch.Size, data: TuningData, train_rows: Indices, test_rows: Indices, loss: LossFunction
) -> float | None:
    """Return the loss on the test samples of the best guess that needs no input.

    For classes it is their shares in the training part; for a regression the constant that is best there
    among the mean and some quantiles, so that it is found for absolute and quantile losses, too.

    Args:
        shape: Shape of the outputs of one sample.
        data: All samples.
        train_rows: Where the guess is learned.
        test_rows: Where it is measured.
        loss: Function of (outputs, targets).

    Returns:
        The loss, or None where outputs do not fit targets or no loss is finite.
    """
    targets = data.targets[torch.from_numpy(test_rows)]
    seen = data.targets[torch.from_numpy(train_rows)]
    size = torch.Size((len(targets), *shape))
    if data.is_classification:
        guess = _class_guess(size, targets, seen, data.ignore_index, last=loss is default_loss)
        if guess is None:
            return None
        guess = guess.sigmoid() if getattr(loss, "takes_probabilities", False) else guess
        return _finite(float(loss(guess, targets)))
    if size.numel() != targets.numel():
        return None
    values = seen.double().numpy()
    constants = [values.mean(axis=0), *np.quantile(values, QUANTILES, axis=0)]
    trained = torch.Size((len(seen), *shape))
    best = min(constants, key=lambda constant: float(loss(_repeat(constant, seen, trained), seen)))
    return _finite(float(loss(_repeat(best, targets, size), targets)))


def collapse(record: EpochRecord, guessed: float | None, labels: npt.NDArray[np.generic]) -> str | None:
    """Return why held-out metrics are those of guessing, or None when something was learned.

    Args:
        record: Metrics of the epoch that counts.
        guessed: Held-out loss of guessing. Where it is not positive, as in a loss that crosses zero, a share
            of it means nothing, and nothing counts as a collapse.
        labels: The n held-out targets.

    Returns:
        A sentence with the figures. A classifier has collapsed when its loss is no better than that of
        guessing and neither accuracy nor macro recall exceed that of guessing by more than chance does.
    """
    if guessed is None or guessed <= 0 or record["loss"] < AT_GUESSING * guessed:
        return None
    reason = f"the held-out loss {record['loss']:.4g} is no better than that of guessing, {guessed:.4g}"
    if "accuracy" not in record:
        return reason
    is_multi_label = "label_accuracy" in record
    counts = np.unique(labels, return_counts=True, axis=0 if is_multi_label else None)[1]
    largest, even = counts.max() / counts.sum(), 1.0 / len(counts)
    # Of several labels, guessing all of them finds all, so that their recall says nothing.
    shares = {"accuracy": largest} if is_multi_label else {"accuracy": largest, "recall_macro": even}
    for name, share in shares.items():
        if record[name] > share + CHANCE * math.sqrt(share * (1 - share) / len(labels)):
            return None
    return f"{reason}, and the accuracy {record['accuracy']:.3g} than the largest class, {largest:.3g}"


def _class_guess(
    size: torch.Size, targets: torch.Tensor, seen: torch.Tensor, ignore_index: int, *, last: bool
) -> torch.Tensor | None:
    """Return outputs that give each class its share; None where outputs of this size fit no targets."""
    if equal_but_for_ones(size, targets.shape):
        if int(seen.max()) > 1:
            return None
        shares = seen.clamp(min=0).double().mean(dim=0).clamp(UNSEEN_COUNT, 1 - UNSEEN_COUNT)
        return torch.logit(shares).float().expand(targets.shape).reshape(size).contiguous()
    dim = class_dim(size, targets.shape, last=last)
    if dim is None:
        return None
    known = seen[seen != ignore_index]
    counts = torch.bincount(known, minlength=size[dim]).double() + UNSEEN_COUNT
    if len(counts) != size[dim]:
        return None
    column = [1] * len(size)
    column[dim] = -1
    return (counts / counts.sum()).log().float().reshape(column).expand(size).contiguous()


def _check_broadcast(loss: LossFunction, outputs: torch.Tensor, targets: torch.Tensor, own: float) -> None:
    """Refuse a loss that differs once outputs have the shape of their targets: it compares all with all."""
    if outputs.shape == targets.shape or not equal_but_for_ones(outputs.shape, targets.shape):
        return
    try:
        aligned = float(loss(outputs.reshape(targets.shape), targets))
    except (RuntimeError, ValueError, IndexError):  # a loss that needs the shape that it is given
        return
    if math.isfinite(own) and not math.isclose(own, aligned, rel_tol=ROUNDING):
        raise ValueError(
            f"untrained_loss: the loss of outputs of shape {tuple(outputs.shape)} for targets of shape "
            f"{tuple(targets.shape)} is {own:.4g}, and {aligned:.4g} in equal shapes: it broadcasts one "
            "against the other; expected outputs.reshape(targets.shape) in the loss."
        )


def _repeat(constant: npt.NDArray[np.float64], targets: torch.Tensor, size: torch.Size) -> torch.Tensor:
    """Return outputs of this size that are one constant for every sample."""
    guess = torch.from_numpy(np.asarray(constant)).to(targets.dtype)
    return guess.expand(targets.shape).reshape(size).contiguous()


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
