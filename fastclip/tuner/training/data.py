"""One view of the user's data: a Dataset, (X, y), or X, y and groups."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset, TensorDataset, default_collate

from fastclip.tuner.training.seeding import seeded

FINGERPRINT_SAMPLES = 256
COMPARED_TARGETS = 16


@dataclass(frozen=True)
class TuningData:
    """Samples to be drawn by index.

    Attributes:
        inputs: Tensor of n samples, or None when `dataset` holds them.
        targets: Tensor of n targets: integers are classes, floating-point numbers are a regression.
        groups: Array of n group labels, or None.
        dataset: Map-style dataset of (inputs, target) pairs, or None.
    """

    inputs: torch.Tensor | None
    targets: torch.Tensor
    groups: npt.NDArray[Any] | None = None
    dataset: Dataset[Any] | None = field(default=None, compare=False)

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

    @property
    def classes(self) -> npt.NDArray[Any]:
        """The classes in ascending order; empty for a regression."""
        return np.unique(self.labels) if self.is_classification else np.empty(0)

    def batch(self, indices: npt.NDArray[np.intp], device: torch.device) -> tuple[Any, torch.Tensor]:
        """Return the inputs and targets of these samples on a device."""
        rows = torch.from_numpy(indices)
        targets = self.targets[rows].to(device)
        if self.inputs is not None:
            return self.inputs[rows].to(device), targets
        if self.dataset is None:
            raise RuntimeError("fastclip bug: TuningData has neither inputs nor a dataset.")
        inputs = default_collate([self.dataset[int(i)][0] for i in indices])
        return _to_device(inputs, device), targets

    def to(self, device: torch.device) -> TuningData:
        """Return the data with its tensors on a device; samples of a dataset are moved batch by batch."""
        if self.inputs is None or device.type == "cpu":
            return self
        return TuningData(self.inputs.to(device), self.targets, self.groups)

    def subset(self, indices: npt.NDArray[np.intp]) -> TuningData:
        """Return the samples at these indices."""
        rows = torch.from_numpy(indices)
        return TuningData(
            None if self.inputs is None else self.inputs[rows],
            self.targets[rows],
            None if self.groups is None else self.groups[indices],
            None if self.dataset is None else torch.utils.data.Subset(self.dataset, indices.tolist()),
        )

    def fingerprint(self) -> str:
        """Return a digest of all targets and groups and of the inputs (a sample of them for a dataset)."""
        digest = hashlib.sha256(np.ascontiguousarray(self.labels).tobytes())
        digest.update(str((len(self), self.targets.dtype)).encode())
        if self.groups is not None:
            digest.update(str(self.groups.tolist()).encode())
        if self.inputs is not None:
            digest.update(str((self.inputs.dtype, tuple(self.inputs.shape))).encode())
            digest.update(self.inputs.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        else:
            rows = _spread(len(self), FINGERPRINT_SAMPLES)
            for first, second in zip(*(self._read(rows, seed) for seed in (0, 1)), strict=True):
                if first == second:
                    digest.update(first)
        return digest.hexdigest()[:16]

    def _read(self, rows: npt.NDArray[np.intp], seed: int) -> list[bytes]:
        """Return the bytes of each tensor of these inputs, read with this seed; outside, no state changes.

        What differs from seed to seed, as augmented images do, says nothing about which data it is.
        """
        cpu = torch.device("cpu")
        with seeded(seed, cpu):
            leaves = _leaves(self.batch(rows, cpu)[0])
        return [leaf.contiguous().flatten().view(torch.uint8).numpy().tobytes() for leaf in leaves]


def as_data(data: Any, y: Any = None, groups: Any = None, *, caller: str) -> TuningData:
    """Return one view of (X, y), of X, y and groups, or of a map-style dataset of (inputs, target) pairs.

    Floating-point arrays become torch's default dtype, integer targets int64.

    Raises:
        TypeError: the data is neither, or a dataset has no length.
        ValueError: lengths differ, or there are no samples.
    """
    if isinstance(data, TuningData):
        return data
    if y is None and isinstance(data, (tuple, list)) and len(data) in (2, 3):
        data, y, groups = (*data, groups)[:3]
    if isinstance(data, TensorDataset) and len(data.tensors) == 2:
        data, y = data.tensors
    if y is not None:
        inputs, targets = _as_tensor(data, caller, "X"), _as_tensor(y, caller, "y", targets=True)
        _check_length(caller, "X", len(inputs), len(targets))
        view = TuningData(inputs, targets, _as_groups(groups, len(targets), caller))
    elif isinstance(data, Dataset):
        if not hasattr(data, "__len__"):
            raise TypeError(
                f"{caller}: data {type(data).__name__} has no length; expected a map-style Dataset."
            )
        _check_length(caller, "data", len(data), len(getattr(data, "targets", data)))
        targets = _as_tensor(_dataset_targets(data), caller, "targets", targets=True)
        view = TuningData(None, targets, _as_groups(groups, len(targets), caller), data)
    else:
        raise TypeError(
            f"{caller}: data is a {type(data).__name__}; expected a torch Dataset, a pair (X, y), or X and y."
        )
    if len(view) == 0:
        raise ValueError(f"{caller}: data has no samples; expected at least two.")
    return view


def _as_tensor(values: Any, caller: str, name: str, *, targets: bool = False) -> torch.Tensor:
    if isinstance(values, torch.Tensor):
        tensor = values.detach().cpu()
    else:
        array = np.asarray(values)
        if array.dtype.kind not in "fiub":
            raise TypeError(
                f"{caller}: {name} has dtype {array.dtype}; expected numbers. Encode classes first, with "
                "sklearn.preprocessing.LabelEncoder for example."
            )
        tensor = torch.from_numpy(np.array(array))
    if tensor.dtype == torch.float64:
        return tensor.to(torch.get_default_dtype())
    if targets and not tensor.is_floating_point():
        return tensor.long()
    return tensor


def _as_groups(groups: Any, length: int, caller: str) -> npt.NDArray[Any] | None:
    if groups is None:
        return None
    array = np.asarray(groups)
    _check_length(caller, "groups", len(array), length)
    return array


def _check_length(caller: str, name: str, found: int, expected: int) -> None:
    if found != expected:
        raise ValueError(f"{caller}: {name} has {found} samples; expected {expected}, one per target.")


def _dataset_targets(dataset: Any) -> Any:
    """Return the target that the dataset yields with each sample.

    torchvision's datasets list them in an attribute, before any transform: it is taken where nothing changes
    targets and some samples agree with it; otherwise every sample is read.
    """
    targets = getattr(dataset, "targets", None)
    if targets is not None and getattr(dataset, "target_transform", None) is None:
        rows = _spread(len(dataset), COMPARED_TARGETS).tolist()
        listed = [np.asarray(targets[i]) for i in rows]
        with seeded(0, torch.device("cpu")):
            yielded = [np.asarray(dataset[i][1]) for i in rows]
        if all(np.array_equal(a, b) for a, b in zip(listed, yielded, strict=True)):
            return targets
    return np.asarray([np.asarray(dataset[i][1]) for i in range(len(dataset))])


def _spread(length: int, count: int) -> npt.NDArray[np.intp]:
    """Return at most `count` row numbers, evenly over all."""
    return np.unique(np.linspace(0, max(length - 1, 0), count).astype(np.intp))[:length]


def _to_device(inputs: Any, device: torch.device) -> Any:
    if isinstance(inputs, torch.Tensor):
        return inputs.to(device)
    if isinstance(inputs, dict):
        return {name: _to_device(value, device) for name, value in inputs.items()}
    return tuple(_to_device(value, device) for value in inputs)


def _leaves(inputs: Any) -> Sequence[torch.Tensor]:
    if isinstance(inputs, torch.Tensor):
        return [inputs]
    return list(inputs.values()) if isinstance(inputs, dict) else list(inputs)
