"""One view of what the user gives: a Dataset, a DataLoader, (X, y), or X, y and groups."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler, SequentialSampler, TensorDataset

from fastclip.tuner.training.data import IGNORED, TuningData, spread
from fastclip.tuner.training.loading import Loading, as_target, split_sample
from fastclip.tuner.training.seeding import seeded

COMPARED_TARGETS = 16
NAME_KINDS = "USO"


def as_data(
    data: Any, y: Any = None, groups: Any = None, *, caller: str, eval_data: Any = None
) -> TuningData:
    """Return one view of (X, y), of X, y and groups, or of a map-style dataset, alone or in a DataLoader.

    Floating-point arrays become torch's default dtype, integer targets int64; targets that are names of
    classes are numbered in the order of the alphabet.

    Args:
        data: What the user gives; the batches of a DataLoader are drawn anew, its other settings count.
        y: Targets for X.
        groups: Group labels.
        caller: Name for messages.
        eval_data: The same samples as they are measured: a Dataset without augmentation, or X.

    Raises:
        TypeError: the data is neither, or a dataset has no length.
        ValueError: lengths or targets differ, or there are no samples.
    """
    if isinstance(data, TuningData):
        return data
    loading = Loading()
    is_loaded = isinstance(data, DataLoader)
    if is_loaded:
        loading, data = _loading(data, caller), data.dataset
    if y is None and isinstance(data, (tuple, list)) and len(data) in (2, 3) and not is_loaded:
        data, y, groups = (*data, groups)[:3]
    if isinstance(data, TensorDataset) and len(data.tensors) == 2 and loading == Loading(batch_size=None):
        data, y = data.tensors
    if y is not None:
        inputs = _as_tensor(data, caller, "X")
        targets, names = _as_targets(y, caller, "y")
        _check_length(caller, "X", len(inputs), len(targets))
        view = TuningData(inputs, targets, _as_groups(groups, len(targets), caller), label_names=names)
        if eval_data is not None:
            raise TypeError(
                f"{caller}: eval_data with X and y; expected both as a Dataset, which may differ in its "
                "transform."
            )
    elif isinstance(data, Dataset) or is_loaded:  # a loader takes anything with a length and items
        _check_map_style(data, "data", caller)
        _check_length(caller, "data", len(data), len(getattr(data, "targets", data)))
        targets, names = _as_targets(_dataset_targets(data, loading), caller, "targets")
        grouped = _as_groups(groups, len(targets), caller)
        view = TuningData(None, targets, grouped, data, loading=loading, label_names=names)
        if eval_data is not None:
            view = _with_eval_data(view, eval_data, caller)
    else:
        raise TypeError(
            f"{caller}: data is a {type(data).__name__}; expected a torch Dataset or DataLoader, a pair "
            "(X, y), or X and y."
        )
    if len(view) == 0:
        raise ValueError(f"{caller}: data has no samples; expected at least two.")
    return view


def _loading(loader: DataLoader[Any], caller: str) -> Loading:
    """Return the settings of a DataLoader, and refuse those that folds would silently not follow."""
    if loader.batch_size is None or type(loader.sampler) not in (SequentialSampler, RandomSampler):
        what = "batch_sampler" if loader.batch_size is None else type(loader.sampler).__name__
        raise ValueError(
            f"{caller}: the DataLoader has a {what}; expected none, because every fold draws its own "
            "batches. Weight classes by the parameter class_weight."
        )
    if loader.drop_last:
        raise ValueError(
            f"{caller}: the DataLoader has drop_last=True; expected False, no sample is dropped."
        )
    names = ("pin_memory", "timeout", "worker_init_fn", "prefetch_factor", "multiprocessing_context")
    collate_fn = None if loader.collate_fn is torch.utils.data.default_collate else loader.collate_fn
    options = {name: getattr(loader, name) for name in names}
    return Loading(collate_fn, loader.num_workers, loader.batch_size, options)


def _with_eval_data(view: TuningData, eval_data: Any, caller: str) -> TuningData:
    if not isinstance(eval_data, Dataset):
        raise TypeError(f"{caller}: eval_data is a {type(eval_data).__name__}; expected a torch Dataset.")
    other = as_data(eval_data, caller=caller).renamed(view.label_names, caller)
    if not torch.equal(other.targets, view.targets):
        raise ValueError(
            f"{caller}: eval_data has other targets than data ({len(other)} and {len(view)} samples); "
            "expected the same samples in the same order."
        )
    return replace(view, eval_dataset=eval_data)


def _check_map_style(data: Any, name: str, caller: str) -> None:
    if not hasattr(data, "__len__"):
        raise TypeError(
            f"{caller}: {name} {type(data).__name__} has no length; expected a map-style Dataset."
        )


def _as_tensor(values: Any, caller: str, name: str) -> torch.Tensor:
    if isinstance(values, torch.Tensor):
        tensor = values.detach().cpu()
    else:
        tensor = torch.from_numpy(np.array(_as_array(values, caller, name)))
    return tensor.to(torch.get_default_dtype()) if tensor.dtype == torch.float64 else tensor


def _as_array(values: Any, caller: str, name: str) -> npt.NDArray[Any]:
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise ValueError(
            f"{caller}: {name} has rows of different length: {error}; expected one length. Give a DataLoader "
            "whose collate_fn pads them."
        ) from error
    if array.dtype.kind not in "fiub":
        raise TypeError(f"{caller}: {name} has dtype {array.dtype}; expected numbers.")
    return array


def _as_targets(values: Any, caller: str, name: str) -> tuple[torch.Tensor, npt.NDArray[Any] | None]:
    """Return the targets as numbers, and the names of the classes where they were given as names."""
    if isinstance(values, torch.Tensor):
        return as_target(values.detach().cpu()), None
    array = np.asarray(values)
    if array.dtype.kind in NAME_KINDS:
        odd = [value for value in array.reshape(-1).tolist() if not isinstance(value, str)][:1]
        if odd or array.ndim != 1:
            found = f"{odd[0]!r} of type {type(odd[0]).__name__}" if odd else f"shape {array.shape}"
            raise TypeError(f"{caller}: {name} has {found}; expected numbers, or one name per sample.")
        names, numbers = np.unique(array.astype(str), return_inverse=True)
        return torch.from_numpy(numbers).long(), names
    return as_target(np.array(_as_array(array, caller, name))), None


def _as_groups(groups: Any, length: int, caller: str) -> npt.NDArray[Any] | None:
    if groups is None:
        return None
    array = np.asarray(groups)
    _check_length(caller, "groups", len(array), length)
    return array


def _check_length(caller: str, name: str, found: int, expected: int) -> None:
    if found != expected:
        raise ValueError(f"{caller}: {name} has {found} samples; expected {expected}, one per target.")


def _dataset_targets(dataset: Any, loading: Loading) -> Any:
    """Return the target that the dataset yields with each sample.

    torchvision's datasets list them in an attribute, before any transform: it is taken where nothing changes
    targets and some samples agree with it; otherwise every sample is read. Targets of different lengths are
    filled up with torch's ignore_index.
    """

    def target(index: int) -> Any:
        if loading.collate_fn is None:
            return split_sample(dataset[index])[1]
        return split_sample(loading.collate([dataset[index]]))[1][0]

    targets = getattr(dataset, "targets", None)
    with seeded(0, torch.device("cpu")):
        if targets is not None and getattr(dataset, "target_transform", None) is None:
            rows = spread(len(dataset), COMPARED_TARGETS).tolist()
            listed = [np.asarray(targets[i]) for i in rows]
            yielded = [np.asarray(target(i)) for i in rows]
            if all(np.array_equal(a, b) for a, b in zip(listed, yielded, strict=True)):
                return targets
        read = [np.asarray(target(i)) for i in range(len(dataset))]
    if len({array.shape for array in read}) <= 1 or any(array.ndim != 1 for array in read):
        return np.asarray(read)
    filled = np.full((len(read), max(len(array) for array in read)), IGNORED)
    for row, array in zip(filled, read, strict=True):
        row[: len(array)] = array
    return filled
