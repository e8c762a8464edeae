"""A small network of linear layers."""

from __future__ import annotations

import math

from torch import Tensor, nn

from fastclip.demo.models.image_shape import ImageShape


class SimpleNet(nn.Module):
    """Three linear layers for grey images of 28 x 28 pixels, or of any other shape.

    Args:
        image_shape: Channels, height and width; the first layer is sized by it.
        num_classes: Number of scores.
    """

    def __init__(self, image_shape: ImageShape = (1, 28, 28), num_classes: int = 10) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(),
            nn.Linear(math.prod(image_shape), 128),
            nn.ReLU(),
            nn.Linear(128, 64),
            nn.ReLU(),
            nn.Linear(64, num_classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return the class scores, shape (n, num_classes), of images of shape (n, *image_shape)."""
        scores: Tensor = self.layers(images)
        return scores
