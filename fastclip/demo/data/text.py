"""English text that comes with Python, as numbered characters."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

import torch
from torch import Tensor

from fastclip.demo.data.errors import DataError

MODULE = "pydoc_data.topics"
"""The help pages of Python's grammar."""

TEST_SHARE = 0.1


@dataclass(frozen=True)
class TextData:
    """A text, parted into its beginning, to train on, and its end, to test on.

    Attributes:
        train: int64, the number of each character.
        test: like train, held out.
        alphabet: the characters in the order of their numbers.
    """

    train: Tensor
    test: Tensor
    alphabet: str


def load_text(num_characters: int = 400_000) -> TextData:
    """Return the beginning of Python's built-in help pages.

    Args:
        num_characters: Characters to take; the last tenth is held out.

    Raises:
        DataError: this Python comes without the pages, or with fewer characters.
    """
    try:
        pages: dict[str, str] = importlib.import_module(MODULE).topics
    except ModuleNotFoundError as error:
        raise DataError(
            f"load_text: this Python comes without {MODULE}; expected it in the standard library. Some "
            "distributions part it off: install their package of the whole library."
        ) from error
    text = "".join(pages.values())[:num_characters]
    if len(text) < num_characters:
        raise DataError(
            f"load_text: {MODULE} has {len(text)} characters; expected at least {num_characters}. "
            "Ask for fewer."
        )
    alphabet = "".join(sorted(set(text)))
    numbers = {character: number for number, character in enumerate(alphabet)}
    ids = torch.tensor([numbers[character] for character in text])
    num_train = round(len(ids) * (1 - TEST_SHARE))
    return TextData(ids[:num_train], ids[num_train:], alphabet)
