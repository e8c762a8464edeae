"""A perceptron deep enough to explode at a rate that a shallow one stands."""

from __future__ import annotations

import itertools
import math

from torch import Tensor, nn

from fastclip.demo.models.image_shape import ImageShape


class DeepMLP(nn.Module):
    """Ten hidden layers of 128 rectified units, initialised after Kaiming He.

    Args:
        image_shape: Channels, height and width; the first layer is sized by it.
        num_classes: Number of scores.
        width: Units of a hidden layer.
        depth: Hidden layers.
    """

    def __init__(
        self, image_shape: ImageShape = (1, 8, 8), num_classes: int = 10, width: int = 128, depth: int = 10
    ) -> None:
        super().__init__()
        sizes = [math.prod(image_shape), *[width] * depth]
        layers: list[nn.Module] = [nn.Flatten()]
        for size, following in itertools.pairwise(sizes):
            linear = nn.Linear(size, following)
            nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
            nn.init.zeros_(linear.bias)
            layers += [linear, nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(width, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        """Return the class scores, shape (n, num_classes), of images of shape (n, *image_shape)."""
        scores: Tensor = self.layers(images)
        return scores
