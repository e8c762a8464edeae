"""A convolutional network with batch normalisation, which stands higher rates than one without."""

from __future__ import annotations

from torch import Tensor, nn

from fastclip.demo.models.image_shape import ImageShape, pooled_pixels


class BatchNormCNN(nn.Module):
    """Three blocks of convolution, batch normalisation and pooling, and one linear layer.

    Args:
        image_shape: Channels, height and width; the linear layer is sized by it.
        num_classes: Number of scores.

    Raises:
        ValueError: the images are smaller than 8 x 8 pixels.
    """

    def __init__(self, image_shape: ImageShape = (3, 32, 32), num_classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential(_block(image_shape[0], 32), _block(32, 64), _block(64, 128))
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(128 * pooled_pixels("BatchNormCNN", image_shape, 3), num_classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return the class scores, shape (n, num_classes), of images of shape (n, *image_shape)."""
        scores: Tensor = self.classifier(self.features(images))
        return scores


def _block(in_channels: int, out_channels: int) -> nn.Sequential:
    # The normalisation subtracts the mean, and a bias with it.
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
        nn.MaxPool2d(2),
    )
