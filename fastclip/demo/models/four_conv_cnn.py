"""A convolutional network without normalisation, which a high rate drives apart."""

from __future__ import annotations

from torch import Tensor, nn

from fastclip.demo.models.image_shape import ImageShape, pooled_pixels


class FourConvCNN(nn.Module):
    """Four convolutions, a pooling behind every second one, and two linear layers.

    Args:
        image_shape: Channels, height and width; the linear layers are sized by it.
        num_classes: Number of scores.

    Raises:
        ValueError: the images are smaller than 4 x 4 pixels.
    """

    def __init__(self, image_shape: ImageShape = (3, 32, 32), num_classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(image_shape[0], 32, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 32, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(64, 64, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(64 * pooled_pixels("FourConvCNN", image_shape, 2), 128),
            nn.ReLU(),
            nn.Linear(128, num_classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return the class scores, shape (n, num_classes), of images of shape (n, *image_shape)."""
        scores: Tensor = self.classifier(self.features(images))
        return scores
