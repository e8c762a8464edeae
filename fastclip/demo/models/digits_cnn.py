"""A convolutional network for small grey images."""

from __future__ import annotations

from torch import Tensor, nn

from fastclip.demo.models.image_shape import ImageShape, pooled_pixels


class DigitsCNN(nn.Module):
    """Three convolutions and two linear layers for grey images of 8 x 8 pixels, or of any other shape.

    Args:
        image_shape: Channels, height and width; the linear layers are sized by it.
        num_classes: Number of scores.

    Raises:
        ValueError: the images are smaller than 4 x 4 pixels.
    """

    def __init__(self, image_shape: ImageShape = (1, 8, 8), num_classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(image_shape[0], 32, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 32, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(64 * pooled_pixels("DigitsCNN", image_shape, 2), 128),
            nn.ReLU(),
            nn.Linear(128, num_classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return the class scores, shape (n, num_classes), of images of shape (n, *image_shape)."""
        scores: Tensor = self.classifier(self.features(images))
        return scores
