"""What guessing scores: the level that an explosion is measured from, and the sign of a collapse."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fastclip.tuner.training.data import TuningData
from fastclip.tuner.training.metrics import LossFunction, default_loss
from fastclip.tuner.training.stepping import EpochRecord, Indices, call

REFERENCE_SAMPLES = 256
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
UNSEEN_COUNT = 1e-3  # of a class that never occurs, so that its logarithm is finite
AT_GUESSING = 0.98  # of the loss of guessing, from which a loss counts as no better
CHANCE = 1.645  # standard errors that a guess exceeds its expected accuracy by in one case of twenty


@torch.no_grad()
def untrained_loss(
    model: nn.Module, data: TuningData, rows: Indices, loss: LossFunction, device: torch.device
) -> tuple[float, torch.Size]:
    """Measure a model before its first step, on some of the samples that it will be trained on.

    A single mini-batch would do for large batches only: the loss of one sample says little about the model.

    Returns:
        The larger of its loss and the loss of guessing, nan where neither is finite; and the shape of the
        outputs of one sample.
    """
    model.eval()
    some = rows[np.unique(np.linspace(0, len(rows) - 1, REFERENCE_SAMPLES).astype(np.intp))]
    inputs, targets = data.batch(some, device)
    outputs = call(model, inputs)
    own = float(loss(outputs, targets))
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
        shares = _class_guess(size, targets, seen, last=loss is default_loss)
        return None if shares is None else _finite(float(loss(shares, targets)))
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
    counts = np.unique(labels, return_counts=True)[1]
    largest, even = counts.max() / counts.sum(), 1.0 / len(counts)
    for name, share in (("accuracy", largest), ("recall_macro", even)):
        if record[name] > share + CHANCE * math.sqrt(share * (1 - share) / len(labels)):
            return None
    return f"{reason}, and the accuracy {record['accuracy']:.3g} than the largest class, {largest:.3g}"


def _class_guess(
    size: torch.Size, targets: torch.Tensor, seen: torch.Tensor, *, last: bool
) -> torch.Tensor | None:
    """Return outputs that give each class its share; None where outputs of this size fit no targets."""
    shape = targets.shape
    if size == shape or (size.numel() == targets.numel() and 1 in size[1:]):
        share = seen.double().mean().clamp(UNSEEN_COUNT, 1 - UNSEEN_COUNT)
        return torch.full(size, float(torch.logit(share)))
    fits_last, fits_second = size[:-1] == shape, len(size) > 1 and size[:1] + size[2:] == shape
    if not (fits_last or fits_second):
        return None
    dim = -1 if fits_last and (last or not fits_second) else 1
    counts = torch.bincount(seen.flatten(), minlength=size[dim]).double() + UNSEEN_COUNT
    if len(counts) != size[dim]:
        return None
    column = [1] * len(size)
    column[dim] = -1
    return (counts / counts.sum()).log().float().reshape(column).expand(size).contiguous()


def _repeat(constant: npt.NDArray[np.float64], targets: torch.Tensor, size: torch.Size) -> torch.Tensor:
    """Return outputs of this size that are one constant for every sample."""
    guess = torch.from_numpy(np.asarray(constant)).to(targets.dtype)
    return guess.expand(targets.shape).reshape(size).contiguous()


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
