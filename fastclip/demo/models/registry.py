"""The networks that sort images, by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from fastclip.demo.models.batch_norm_cnn import BatchNormCNN
from fastclip.demo.models.deep_mlp import DeepMLP
from fastclip.demo.models.image_shape import ImageShape
from fastclip.demo.models.named import NamedModel, Network
from fastclip.demo.models.plain_cnns import DigitsCNN, FourConvCNN
from fastclip.demo.models.simple_net import SimpleNet

IMAGE_NETWORKS: Mapping[str, Network] = MappingProxyType(
    {
        "three-conv": Network("Three-convolution CNN", DigitsCNN),
        "four-conv": Network("Four-convolution CNN", FourConvCNN),
        "batch-norm": Network("BatchNorm CNN", BatchNormCNN),
        "simple": Network("SimpleNet", SimpleNet),
        "deep-mlp": Network("Deep MLP", DeepMLP),
    }
)


@dataclass(frozen=True)
class ImageModel(NamedModel):
    """Makes networks for images of one shape.

    Attributes:
        name: One of `IMAGE_NETWORKS`.
        image_shape: Channels, height and width of an image.
        num_classes: Number of scores.
    """

    networks = IMAGE_NETWORKS

    image_shape: ImageShape
    num_classes: int

    def __post_init__(self) -> None:
        """Check that there is a network of this name that takes images of this shape.

        Raises:
            ValueError: the name is unknown, or the images are too small.
        """
        super().__post_init__()
        with torch.device("meta"):
            self({})

    def __call__(self, params: dict[str, Any]) -> nn.Module:
        """Return a new network."""
        del params
        return self.networks[self.name].make(self.image_shape, self.num_classes)
