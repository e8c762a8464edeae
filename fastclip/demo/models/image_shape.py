"""The shape of an image, and what it becomes behind pooling layers."""

from __future__ import annotations

from typing import TypeAlias

ImageShape: TypeAlias = tuple[int, int, int]
"""Channels, height, width."""


def pooled_pixels(model: str, shape: ImageShape, num_pools: int) -> int:
    """Return the pixels per channel behind poolings that halve both sides, an odd last row or column dropped.

    Raises:
        ValueError: no pixel is left; the message names the model and the smallest image that it takes.
    """
    _, height, width = shape
    pixels = (height >> num_pools) * (width >> num_pools)
    if pixels == 0:
        smallest = 1 << num_pools
        raise ValueError(
            f"{model}: images of {height} x {width} pixels vanish in {num_pools} poolings; expected at least "
            f"{smallest} x {smallest}. Enlarge the images."
        )
    return pixels
