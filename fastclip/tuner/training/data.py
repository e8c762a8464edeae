"""The user's samples as training draws them: by index, in batches, on a device."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset, Subset

from fastclip.tuner.training.loading import Loading, as_target, split_sample, to_device
from fastclip.tuner.training.seeding import seeded

FINGERPRINT_SAMPLES = 256
IGNORED = -100  # torch's default ignore_index

Indices = npt.NDArray[np.intp]


@dataclass(frozen=True)
class TuningData:
    """Samples to be drawn by index.

    Attributes:
        inputs: Tensor of n samples, or None when `dataset` holds them.
        targets: Tensor of n targets: integers are classes, floating-point numbers are a regression.
        groups: Array of n group labels, or None.
        dataset: Map-style dataset of samples that `split_sample` takes, or None.
        eval_dataset: The same samples as they are measured, without augmentation; None is `dataset`.
        loading: How samples of a dataset become batches.
        label_names: What the classes 0, 1, ... are called, where targets were given as names.
        ignore_index: Target that does not count.
    """

    inputs: torch.Tensor | None
    targets: torch.Tensor
    groups: npt.NDArray[Any] | None = None
    dataset: Dataset[Any] | None = field(default=None, compare=False)
    eval_dataset: Dataset[Any] | None = field(default=None, compare=False)
    loading: Loading = field(default_factory=Loading, compare=False)
    label_names: npt.NDArray[Any] | None = None
    ignore_index: int = IGNORED

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.targets)

    @property
    def is_classification(self) -> bool:
        """Whether the targets are classes."""
        return not self.targets.is_floating_point()

    @property
    def labels(self) -> npt.NDArray[Any]:
        """The targets as an array, as scikit-learn's splitters want them."""
        return self.targets.numpy()

    @cached_property
    def classes(self) -> npt.NDArray[Any]:
        """The classes in ascending order; empty for a regression."""
        if not self.is_classification:
            return np.empty(0)
        return np.setdiff1d(self.labels, [self.ignore_index])

    @cached_property
    def has_ignored(self) -> bool:
        """Whether some targets do not count."""
        return self.is_classification and bool((self.targets == self.ignore_index).any())

    @property
    def class_names(self) -> list[Any]:
        """What the classes are called, in the order of `classes`."""
        names: list[Any] = (
            self.classes if self.label_names is None else self.label_names[self.classes]
        ).tolist()
        return names

    def batch(self, indices: Indices, device: torch.device, *, measured: bool = False) -> tuple[Any, Any]:
        """Return the inputs and targets of these samples on a device, as trained on or as measured."""
        if self.inputs is not None:
            rows = torch.from_numpy(indices)
            return self.inputs[rows].to(device), self.targets[rows].to(device)
        dataset: Any = self._dataset(measured)
        return self._split(self.loading.collate([dataset[int(i)] for i in indices]), indices, device)

    def batches(
        self, parts: Sequence[Indices], device: torch.device, *, measured: bool = False
    ) -> Iterator[tuple[Any, Any]]:
        """Yield `batch` of each part, read by worker processes where the data says so."""
        if self.inputs is not None or self.loading.num_workers == 0:
            for part in parts:
                yield self.batch(part, device, measured=measured)
            return
        loader = DataLoader(
            self._dataset(measured),
            batch_sampler=[part.tolist() for part in parts],
            collate_fn=self.loading.collate,
            num_workers=self.loading.num_workers,
            **self.loading.options,
        )
        for part, collated in zip(parts, loader, strict=True):
            yield self._split(collated, part, device)

    def to(self, device: torch.device) -> TuningData:
        """Return the data with its tensors on a device; samples of a dataset are moved batch by batch."""
        if self.inputs is None or device.type == "cpu":
            return self
        return replace(self, inputs=self.inputs.to(device))

    def subset(self, indices: Indices) -> TuningData:
        """Return the samples at these indices."""
        rows = torch.from_numpy(indices)
        chosen = [
            None if dataset is None else Subset(dataset, indices.tolist())
            for dataset in (self.dataset, self.eval_dataset)
        ]
        return replace(
            self,
            inputs=None if self.inputs is None else self.inputs[rows],
            targets=self.targets[rows],
            groups=None if self.groups is None else self.groups[indices],
            dataset=chosen[0],
            eval_dataset=chosen[1],
        )

    def renamed(self, label_names: npt.NDArray[Any] | None, caller: str) -> TuningData:
        """Return the data with its classes numbered as these names are.

        Raises:
            ValueError: a class has none of the names, or only one of the two has names.
        """
        if (label_names is None) != (self.label_names is None):
            kinds = ["numbers" if names is None else "names" for names in (self.label_names, label_names)]
            raise ValueError(f"{caller}: y holds {kinds[0]}; expected {kinds[1]} of classes, as in training.")
        if label_names is None or self.label_names is None:
            return self
        unknown = np.setdiff1d(self.label_names, label_names)
        if len(unknown):
            raise ValueError(
                f"{caller}: y has the class {unknown.tolist()[0]!r}; expected one of "
                f"{', '.join(map(str, label_names))}."
            )
        numbers = torch.from_numpy(np.searchsorted(label_names, self.label_names))
        return replace(self, targets=numbers[self.targets], label_names=label_names)

    def fingerprint(self) -> str:
        """Return a digest of all targets and groups and of the inputs (a sample of them for a dataset)."""
        digest = hashlib.sha256(np.ascontiguousarray(self.labels).tobytes())
        digest.update(str((len(self), self.targets.dtype)).encode())
        for told in (self.groups, self.label_names):
            if told is not None:
                digest.update(str(told.tolist()).encode())
        if self.inputs is not None:
            digest.update(str((self.inputs.dtype, tuple(self.inputs.shape))).encode())
            digest.update(_bytes(self.inputs))
            return digest.hexdigest()[:16]
        rows = spread(len(self), FINGERPRINT_SAMPLES)
        for measured in (False, True) if self.eval_dataset is not None else (False,):
            # What differs from seed to seed, as augmented images do, says nothing about which data it is.
            for first, second in zip(*(self._read(rows, seed, measured) for seed in (0, 1)), strict=True):
                if first == second:
                    digest.update(first)
        return digest.hexdigest()[:16]

    def _read(self, rows: Indices, seed: int, measured: bool) -> list[bytes]:
        """Return the bytes of each tensor of these inputs, read with this seed; outside, no state changes."""
        cpu = torch.device("cpu")
        with seeded(seed, cpu):
            return [_bytes(leaf) for leaf in _leaves(self.batch(rows, cpu, measured=measured)[0])]

    def _dataset(self, measured: bool) -> Dataset[Any]:
        chosen = self.eval_dataset if measured and self.eval_dataset is not None else self.dataset
        if chosen is None:
            raise RuntimeError("fastclip bug: TuningData has neither inputs nor a dataset.")
        return chosen

    def _split(self, collated: Any, indices: Indices, device: torch.device) -> tuple[Any, torch.Tensor]:
        inputs, targets = split_sample(collated)
        if self.loading.collate_fn is None or self.label_names is not None:
            targets = self.targets[torch.from_numpy(indices)]
        return to_device(inputs, device), as_target(targets).to(device)


def spread(length: int, count: int) -> Indices:
    """Return at most `count` row numbers, evenly over all."""
    return np.unique(np.linspace(0, max(length - 1, 0), count).astype(np.intp))[:length]


def _leaves(inputs: Any) -> list[torch.Tensor]:
    if isinstance(inputs, torch.Tensor):
        return [inputs]
    if isinstance(inputs, Mapping):
        inputs = list(inputs.values())
    return [leaf for value in inputs for leaf in _leaves(value)] if isinstance(inputs, (tuple, list)) else []


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
