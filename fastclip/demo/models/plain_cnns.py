"""Convolutional networks without normalisation, which a high rate drives apart."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fastclip.demo.models.image_shape import ImageShape, pooled_pixels


class PlainCNN(nn.Module):
    """Stages of 3 x 3 convolutions with a pooling behind each, and two linear layers.

    Args:
        image_shape: Channels, height and width; the linear layers are sized by it.
        num_classes: Number of scores.
        stages: Channels that each convolution of each stage puts out.

    Raises:
        ValueError: the images vanish in the poolings.
    """

    def __init__(self, image_shape: ImageShape, num_classes: int, stages: Sequence[Sequence[int]]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = image_shape[0]
        for stage in stages:
            for width in stage:
                layers += [nn.Conv2d(channels, width, kernel_size=3, padding=1), nn.ReLU()]
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(channels * pooled_pixels(type(self).__name__, image_shape, len(stages)), 128),
            nn.ReLU(),
            nn.Linear(128, num_classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return the class scores, shape (n, num_classes), of images of shape (n, *image_shape)."""
        scores: Tensor = self.classifier(self.features(images))
        return scores


class DigitsCNN(PlainCNN):
    """Three convolutions, for grey images of 8 x 8 pixels or of any other shape from 4 x 4 up."""

    def __init__(self, image_shape: ImageShape = (1, 8, 8), num_classes: int = 10) -> None:
        super().__init__(image_shape, num_classes, [(32, 32), (64,)])


class FourConvCNN(PlainCNN):
    """Four convolutions, for colour images of 32 x 32 pixels or of any other shape from 4 x 4 up."""

    def __init__(self, image_shape: ImageShape = (3, 32, 32), num_classes: int = 10) -> None:
        super().__init__(image_shape, num_classes, [(32, 32), (64, 64)])
