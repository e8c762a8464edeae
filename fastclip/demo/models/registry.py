"""The networks that sort images, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from fastclip.demo.models.batch_norm_cnn import BatchNormCNN
from fastclip.demo.models.deep_mlp import DeepMLP
from fastclip.demo.models.image_shape import ImageShape
from fastclip.demo.models.plain_cnns import DigitsCNN, FourConvCNN
from fastclip.demo.models.simple_net import SimpleNet


@dataclass(frozen=True)
class ImageNetwork:
    """A family of networks that sort images of any shape into any number of classes.

    Attributes:
        title: What it is, in a word or two.
        make: Takes the shape of an image and the number of classes.
    """

    title: str
    make: Callable[[ImageShape, int], nn.Module]


IMAGE_NETWORKS: Mapping[str, ImageNetwork] = MappingProxyType(
    {
        "three-conv": ImageNetwork("Three-convolution CNN", DigitsCNN),
        "four-conv": ImageNetwork("Four-convolution CNN", FourConvCNN),
        "batch-norm": ImageNetwork("BatchNorm CNN", BatchNormCNN),
        "simple": ImageNetwork("SimpleNet", SimpleNet),
        "deep-mlp": ImageNetwork("Deep MLP", DeepMLP),
    }
)


@dataclass(frozen=True)
class ImageModel:
    """Makes new networks of one family, shape and number of classes, as `TunerCV` wants them.

    Attributes:
        name: One of `IMAGE_NETWORKS`.
        image_shape: Channels, height and width of an image.
        num_classes: Number of scores.
    """

    name: str
    image_shape: ImageShape
    num_classes: int

    def __post_init__(self) -> None:
        """Check that there is a network of this name that takes images of this shape.

        Raises:
            ValueError: the name is unknown, or the images are too small.
        """
        if self.name not in IMAGE_NETWORKS:
            raise ValueError(
                f"ImageModel: {self.name!r} is unknown; expected one of {', '.join(IMAGE_NETWORKS)}."
            )
        with torch.device("meta"):
            self({})

    @property
    def title(self) -> str:
        """What it is, in a word or two."""
        return IMAGE_NETWORKS[self.name].title

    def __call__(self, params: dict[str, Any]) -> nn.Module:
        """Return a new network, initialised from torch's random state; no parameter concerns its layers."""
        del params
        return IMAGE_NETWORKS[self.name].make(self.image_shape, self.num_classes)
