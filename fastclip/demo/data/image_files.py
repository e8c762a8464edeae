"""One image file as pixels, or why it is none."""

from __future__ import annotations

import struct
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from fastclip.demo.data.classification import Pixels

FOREIGN = "no image that Pillow knows"

# What Pillow raises for damaged files; SyntaxError is a broken PNG.
BROKEN_IMAGE = (
    *(OSError, SyntaxError, ValueError, LookupError, EOFError, struct.error, ArithmeticError, TypeError),
    *(NotImplementedError, MemoryError, Image.DecompressionBombError),
)


class UnreadableImageError(Exception):
    """A file is no image, or a broken one; the message is the reason and does not name the file."""


def find_reason(path: Path) -> str | None:
    """Return why an entry of a class folder is no image as far as its name, and if need be its header, tell.

    A file named as an image is not opened, so that it is decoded once, when it is read.
    """
    if path.is_dir():
        return "a folder"
    if path.suffix.lower() in _suffixes():
        return None
    try:
        with Image.open(path):
            return None
    except BROKEN_IMAGE as error:
        return _reason(error)


def read_image(path: Path, size: int) -> Pixels:
    """Return one image, shape (size, size, 3), from 0 to 255; float32 if it has more levels.

    Raises:
        UnreadableImageError: it is truncated, foreign, or of values of an unknown range.
    """
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                return _read_deep(image, size)
            return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))
    except BROKEN_IMAGE as error:
        raise UnreadableImageError(_reason(error)) from error


@cache
def _suffixes() -> frozenset[str]:
    """Return the suffixes of the formats that Pillow reads."""
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN)


def _reason(error: BaseException) -> str:
    if isinstance(error, UnidentifiedImageError):
        return FOREIGN
    return f"cannot be read, may be truncated: {' '.join(str(error).split()) or type(error).__name__}"


def _read_deep(image: Image.Image, size: int) -> NDArray[np.float32]:
    """Return a grey image of 16 or 32 bits, or of floating-point numbers, which Pillow would cut off at 255.

    Integers are of 16 bits unless all are below 256; floating-point numbers run to 1, or to 255 if one is
    above.
    """
    values = np.asarray(image).astype(np.float32)
    if image.mode.startswith("I"):
        top = 255 if image.mode == "I" and image.format != "PNG" and values.max() <= 255 else 65535
    else:
        top = 1 if values.max() <= 1 else 255
    if not (values.min() >= 0 and values.max() <= top):  # or nan
        raise UnreadableImageError(
            f"values from {values.min():g} to {values.max():g}, expected 0 to 65535 in an integer image, 0 "
            "to 1 or 0 to 255 in a floating-point one"
        )
    resized = Image.fromarray(values * (255 / top)).resize((size, size), Image.Resampling.BILINEAR)
    return np.repeat(np.asarray(resized)[..., None], 3, axis=-1)
