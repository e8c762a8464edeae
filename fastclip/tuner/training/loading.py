"""How samples of a dataset become batches of inputs and targets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import default_collate

TARGET_KEYS = ("labels", "label", "targets", "target", "y")


@dataclass(frozen=True)
class Loading:
    """How samples of a dataset become batches: what a torch DataLoader says.

    Attributes:
        collate_fn: Makes a batch of a list of samples; None is torch's own.
        num_workers: Processes that read samples.
        batch_size: Samples of a mini-batch where no parameter says it.
        options: Further arguments of DataLoader.
    """

    collate_fn: Callable[[list[Any]], Any] | None = None
    num_workers: int = 0
    batch_size: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def collate(self, samples: list[Any]) -> Any:
        """Return a batch of these samples.

        Raises:
            ValueError: they have different shapes and there is no collate_fn.
        """
        if self.collate_fn is not None:
            return self.collate_fn(samples)
        try:
            return default_collate(samples)
        except RuntimeError as error:
            raise ValueError(
                f"Loading.collate: samples make no batch: {error}; expected tensors of one shape. Give a "
                "DataLoader whose collate_fn pads them, with torch.nn.utils.rnn.pad_sequence for example."
            ) from error


def split_sample(sample: Any) -> tuple[Any, Any]:
    """Return the inputs and the target of a sample, or of a batch of them.

    Args:
        sample: A pair; a longer tuple, whose last element is the target and whose others are arguments of the
            model; or a dict with one key of `TARGET_KEYS`, whose others are keyword arguments of the model.

    Raises:
        TypeError: it is none of them.
    """
    if isinstance(sample, Mapping):
        key = next((key for key in TARGET_KEYS if key in sample), None)
        if key is not None:
            return {name: value for name, value in sample.items() if name != key}, sample[key]
        raise TypeError(
            f"split_sample: a sample has the keys {', '.join(map(str, sample))}; expected one of "
            f"{', '.join(TARGET_KEYS)} for the target."
        )
    if not isinstance(sample, (tuple, list)) or len(sample) < 2:
        raise TypeError(
            f"split_sample: a sample is a {type(sample).__name__}; expected (inputs, target), "
            "(argument, argument, ..., target) or a dict."
        )
    return (sample[0] if len(sample) == 2 else tuple(sample[:-1])), sample[-1]


def as_target(values: Any) -> torch.Tensor:
    """Return targets in torch's default dtype, integers as int64."""
    tensor = torch.as_tensor(values)
    if tensor.dtype == torch.float64:
        return tensor.to(torch.get_default_dtype())
    return tensor if tensor.is_floating_point() else tensor.long()


def to_device(inputs: Any, device: torch.device) -> Any:
    """Return inputs of any structure on a device; what knows no device stays as it is."""
    if hasattr(inputs, "to"):  # also packed sequences, which are tuples
        return inputs.to(device)
    if isinstance(inputs, Mapping):
        return {name: to_device(value, device) for name, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return tuple(to_device(value, device) for value in inputs)
    return inputs
