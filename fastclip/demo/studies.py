"""The demo's data and networks as a study file of the tuner names them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastclip.demo.data import (
    ClassificationData,
    load_cifar10,
    load_digits,
    load_image_folder,
    load_mnist,
    load_texts,
)
from fastclip.demo.data.image_folder import SIZE
from fastclip.demo.data.texts import MAX_LENGTH, MAX_WORDS, TextDataset, as_loader
from fastclip.demo.models import IMAGE_NETWORKS, TEXT_NETWORKS, ImageModel, TextModel
from fastclip.tuner.data import TuningData, as_data
from fastclip.tuner.study.kinds import KindData

ALL = 10**9
"""More samples than there are."""


def digits(*, seed: int = 0) -> KindData:
    """Return scikit-learn's digits, as `load_digits` does."""
    return _images(load_digits(seed=seed))


def mnist(*, path: str, num_train: int = ALL, num_test: int = ALL, seed: int = 0) -> KindData:
    """Return MNIST, as `load_mnist` does."""
    return _images(load_mnist(_folder(path), num_train=num_train, num_test=num_test, seed=seed))


def cifar10(*, path: str, num_train: int = ALL, num_test: int = ALL, seed: int = 0) -> KindData:
    """Return CIFAR-10, as `load_cifar10` does."""
    return _images(load_cifar10(_folder(path), num_train=num_train, num_test=num_test, seed=seed))


def image_folder(
    *,
    path: str,
    size: int = SIZE,
    skip_unreadable: bool = False,
    num_train: int = ALL,
    num_test: int = ALL,
    seed: int = 0,
) -> KindData:
    """Return images in one folder per class, as `load_image_folder` does."""
    return _images(
        load_image_folder(
            _folder(path),
            num_train=num_train,
            num_test=num_test,
            size=size,
            skip_unreadable=skip_unreadable,
            seed=seed,
        )
    )


def texts(
    *,
    path: str,
    num_train: int = ALL,
    num_test: int = ALL,
    max_words: int = MAX_WORDS,
    max_length: int = MAX_LENGTH,
    skip_unreadable: bool = False,
    seed: int = 0,
) -> KindData:
    """Return texts of different length in classes, as `load_texts` does."""
    data = load_texts(
        _folder(path),
        num_train=num_train,
        num_test=num_test,
        max_words=max_words,
        max_length=max_length,
        skip_unreadable=skip_unreadable,
        seed=seed,
    )
    return KindData(as_loader(data.train), as_loader(data.test), data.skipped)


def named_model(name: str, data: Any) -> ImageModel | TextModel:
    """Return what makes networks of this name for the data.

    Args:
        name: One of `IMAGE_NETWORKS` or of `TEXT_NETWORKS`.
        data: What is searched on; of images, any data whose inputs are of shape (n, channels, height, width).

    Raises:
        ValueError: the name is unknown, or the network and the data do not fit.
    """
    if name not in IMAGE_NETWORKS and name not in TEXT_NETWORKS:
        raise ValueError(
            f"named_model: {name!r} is unknown; expected one of {', '.join(IMAGE_NETWORKS)} for images, "
            f"{', '.join(TEXT_NETWORKS)} for texts, or a factory of your own."
        )
    view = as_data(data, caller="[data]")
    if not view.is_classification or view.targets.dim() != 1:
        raise ValueError(
            f"named_model: {name} sorts into classes, and the targets are {view.targets.dtype} of shape "
            f"{tuple(view.targets.shape)}; expected one class for each sample. Name a factory of your own."
        )
    num_classes = int(view.classes.max()) + 1
    if name in TEXT_NETWORKS:
        return TextModel(name, _num_tokens(name, view), num_classes)
    inputs = view.batch(np.arange(1), torch.device("cpu"))[0]
    if not isinstance(inputs, Tensor) or inputs.dim() != 4 or not inputs.is_floating_point():
        found = (
            f"{inputs.dtype} of shape {('n', *inputs.shape[1:])}"
            if isinstance(inputs, Tensor)
            else type(inputs)
        )
        raise ValueError(
            f"named_model: {name} sorts images, and the inputs are {found}; expected floating-point numbers "
            f"of shape (n, channels, height, width). Texts are sorted by {', '.join(TEXT_NETWORKS)}."
        )
    _, channels, height, width = inputs.shape
    return ImageModel(name, (channels, height, width), num_classes)


def _num_tokens(name: str, view: TuningData) -> int:
    if isinstance(view.dataset, TextDataset):
        return view.dataset.num_tokens
    raise ValueError(
        f'named_model: {name} sorts texts, and the data is of another kind; expected that of kind = "text". '
        f"Images are sorted by {', '.join(IMAGE_NETWORKS)}."
    )


def _images(data: ClassificationData) -> KindData:
    def named(labels: Tensor) -> Any:
        return np.asarray(data.classes)[labels.numpy()] if data.classes else labels

    train, test = (data.train_inputs, named(data.train_labels)), (data.test_inputs, named(data.test_labels))
    return KindData(train, test, data.skipped)


def _folder(path: str) -> Path:
    return Path(path).expanduser()
