"""Texts of different length in classes, as numbered words."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from fastclip.demo.data.classification import sample_rows
from fastclip.demo.data.errors import DataError, told
from fastclip.demo.data.folders import hold_out, is_hidden, shown, test_folder
from fastclip.demo.models.text_networks import PADDING

MAX_WORDS = 20_000
MAX_LENGTH = 400

UNKNOWN = PADDING + 1
"""The number of words outside the vocabulary; that of what fills a batch up is PADDING."""

SUFFIX = ".txt"
WORD = re.compile(r"\w+|[^\w\s]")

Sample: TypeAlias = "tuple[Tensor, str]"


class TextDataset(Dataset[Sample]):
    """Numbered words and the class of each text.

    Args:
        texts: int64 word numbers of each text, of different length.
        targets: The class of each, by name.
        num_tokens: Numbers that occur: the vocabulary, padding and unknown words.
    """

    def __init__(self, texts: Sequence[Tensor], targets: Sequence[str], num_tokens: int) -> None:
        self.texts, self.targets, self.num_tokens = list(texts), list(targets), num_tokens

    def __len__(self) -> int:
        """Return the number of texts."""
        return len(self.texts)

    def __getitem__(self, row: int) -> Sample:
        """Return a text and its class."""
        return self.texts[row], self.targets[row]


@dataclass(frozen=True)
class LabelledTexts:
    """Texts, parted into those to train on and those to test on.

    Attributes:
        train: The texts to train on.
        test: Those held out.
        vocabulary: The words in the order of their numbers, which begin behind PADDING and UNKNOWN.
        skipped: What was left out of the folder by the caller's choice, one sentence each.
    """

    train: TextDataset
    test: TextDataset
    vocabulary: tuple[str, ...]
    skipped: tuple[str, ...] = ()


def load_texts(
    folder: Path,
    *,
    num_train: int = 50_000,
    num_test: int = 10_000,
    max_words: int = MAX_WORDS,
    max_length: int = MAX_LENGTH,
    skip_unreadable: bool = False,
    seed: int = 0,
) -> LabelledTexts:
    """Return texts in classes, each as long as it is, their words in small letters and numbered.

    Args:
        folder: Holds a folder per class with a .txt file per text, or a .txt file per class with a text per
            line, in UTF-8; or a folder `train` and one of `test`, `val`, `valid` and `validation` that do.
            Without a test folder a fifth of each class is held out. Hidden files and blank lines are passed
            over.
        num_train: Training texts to take at most, drawn from all of them.
        num_test: Test texts to take at most.
        max_words: Size of the vocabulary: the words that are most frequent in the training texts.
        max_length: Words after which a text is cut.
        skip_unreadable: Leave out what is no .txt file, is not in UTF-8 or has no word, and list it in
            `skipped`.
        seed: Seed of what is held out and taken.

    Returns:
        Datasets of (word numbers, class); `as_loader` makes batches of them.

    Raises:
        DataError: a class has too few texts, or, unless they are skipped, there are unreadable entries: all
            are found, and the first ten named.
    """
    if min(max_words, max_length) < 1:
        raise DataError(f"load_texts: max_words={max_words}, max_length={max_length}; expected at least 1.")
    unreadable: list[str] = []
    if (folder / "train").is_dir():
        parts = [_read_classes(folder / "train", unreadable)]
        parts.append(_read_classes(test_folder(folder, "load_texts"), unreadable))
    else:
        parts = [_read_classes(folder, unreadable)]
    if unreadable and not skip_unreadable:
        raise DataError(
            f"load_texts: {folder} has {told(unreadable)}; expected {SUFFIX} files in UTF-8 with words. Move "
            "the others away, or leave them out: skip_unreadable=True."
        )
    for part in parts:
        _check_classes(folder, part, parts[0])
    train, test = parts if len(parts) == 2 else _split(folder, parts[0], seed)
    train, test = _sample(train, num_train, seed), _sample(test, num_test, seed)
    words = Counter(word for _, text in train for word in text[:max_length])
    vocabulary = sorted(words, key=lambda word: (-words[word], word))[:max_words]
    numbers = {word: number for number, word in enumerate(vocabulary, start=UNKNOWN + 1)}

    def dataset(part: Sequence[_Labelled]) -> TextDataset:
        encoded = [
            torch.tensor([numbers.get(word, UNKNOWN) for word in text[:max_length]]) for _, text in part
        ]
        return TextDataset(encoded, [name for name, _ in part], len(vocabulary) + UNKNOWN + 1)

    return LabelledTexts(dataset(train), dataset(test), tuple(vocabulary), tuple(unreadable))


def pad(samples: Sequence[Sample]) -> tuple[Tensor, list[str]]:
    """Return texts filled up with PADDING to the longest, shape (n, length), and their classes."""
    texts, classes = zip(*samples, strict=True)
    return pad_sequence(list(texts), batch_first=True, padding_value=PADDING), list(classes)


def as_loader(texts: TextDataset) -> DataLoader[Sample]:
    """Return a loader whose batches of 32 are padded."""
    return DataLoader(texts, batch_size=32, collate_fn=pad)


_Labelled: TypeAlias = "tuple[str, list[str]]"
"""The class and the words of a text."""


def _read_classes(folder: Path, unreadable: list[str]) -> list[_Labelled]:
    """Return the texts of a folder, and add what is none, with the reason."""
    if not folder.is_dir():
        raise DataError(f"load_texts: {folder} is not a folder; expected one with the texts of each class.")
    entries = sorted(path for path in folder.iterdir() if not is_hidden(path))
    folders = [path for path in entries if path.is_dir()]
    read: list[_Labelled] = []
    if folders:  # a file beside them belongs to no class, as a licence does not
        for class_folder in folders:
            for path in sorted(path for path in class_folder.iterdir() if not is_hidden(path)):
                text = _read_file(path, unreadable)
                if text is not None:
                    _add(read, class_folder.name, text, shown(path), unreadable)
        return read
    for path in entries:
        text = _read_file(path, unreadable)
        for number, line in enumerate((text or "").splitlines(), start=1):
            if line.strip():
                _add(read, path.stem, line, f"{shown(path)}, line {number}", unreadable)
    return read


def _add(read: list[_Labelled], name: str, text: str, place: str, unreadable: list[str]) -> None:
    words = WORD.findall(text.lower())
    if words:
        read.append((name, words))
    else:
        unreadable.append(f"{place} (no word)")


def _read_file(path: Path, unreadable: list[str]) -> str | None:
    if path.is_dir():
        unreadable.append(f"{shown(path)} (a folder)")
    elif path.suffix != SUFFIX:
        unreadable.append(f"{shown(path)} (no {SUFFIX} file)")
    else:
        try:
            return path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            unreadable.append(f"{shown(path)} (cannot be read: {error})")
    return None


def _sample(texts: Sequence[_Labelled], count: int, seed: int) -> list[_Labelled]:
    """Return at most `count` texts, in their order."""
    return [texts[row] for row in sorted(sample_rows(len(texts), count, seed))]


def _check_classes(folder: Path, part: Sequence[_Labelled], first: Sequence[_Labelled]) -> None:
    found, expected = (sorted({name for name, _ in texts}) for texts in (part, first))
    if len(found) < 2:
        raise DataError(
            f"load_texts: {folder} has texts of {', '.join(found) or 'no class'}; expected at least two "
            f"classes, each a folder of {SUFFIX} files or a {SUFFIX} file with a text per line."
        )
    if found != expected:
        raise DataError(
            f"load_texts: {folder} has the classes {', '.join(found)} to test on and {', '.join(expected)} "
            "to train on; expected the same."
        )


def _split(folder: Path, texts: list[_Labelled], seed: int) -> tuple[list[_Labelled], list[_Labelled]]:
    """Hold a fifth of each class out."""
    counts = Counter(name for name, _ in texts)
    rarest, least = min(counts.items(), key=lambda item: item[1])
    if least < 2:
        raise DataError(
            f"load_texts: {folder} has one text of {rarest}; expected at least two, one to train on and one "
            "to test on."
        )
    train, test = hold_out([name for name, _ in texts], seed)
    return [texts[row] for row in train], [texts[row] for row in test]
