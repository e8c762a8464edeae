"""The files of CIFAR-10: records of its binary version, pickled batches of its Python version."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastclip.demo.data.classification import LabelledPixels
from fastclip.demo.data.errors import DataError

NUM_CLASSES = 10
SHAPE = (3, 32, 32)
NUM_PIXELS = 3 * 32 * 32
"""The red, green and blue pixels of an image, row by row."""

RECORD_BYTES = 1 + NUM_PIXELS
"""A label, then the pixels."""

DOWNLOAD = "It is in cifar-10-binary.tar.gz and cifar-10-python.tar.gz at https://www.cs.toronto.edu/~kriz/cifar.html."

# All that a damaged or foreign pickle makes `pickle` raise, beside its own errors.
BROKEN_PICKLE = (
    *(pickle.UnpicklingError, EOFError, struct.error, ArithmeticError, LookupError, MemoryError),
    *(AttributeError, TypeError, ValueError, ImportError),
)


def read_binary(path: Path) -> LabelledPixels:
    """Return the images of a file of the binary version, which may hold any number of records.

    Raises:
        DataError: the file is truncated or of another kind.
    """
    content = np.fromfile(path, dtype=np.uint8)
    if len(content) == 0 or len(content) % RECORD_BYTES:
        raise DataError(
            f"load_cifar10: {path} has {len(content)} bytes, and so is truncated or of another kind; "
            f"expected a whole number of records of {RECORD_BYTES} bytes. {DOWNLOAD}"
        )
    records = content.reshape(-1, RECORD_BYTES)
    labels = records[:, 0].astype(np.int64)
    _check_labels(path, labels)
    return LabelledPixels(records[:, 1:].reshape(-1, *SHAPE), labels)


def read_python(path: Path) -> LabelledPixels:
    """Return the images of a file of the Python version: a pickled dict of `data` and `labels`.

    Raises:
        DataError: the file is truncated, of another kind, or names code to run, which is not run.
    """
    batch = _read_pickle(path)
    data, labels = _entry(path, batch, "data"), _entry(path, batch, "labels")
    kind = f"{data.dtype} of shape {data.shape}" if isinstance(data, np.ndarray) else type(data).__name__
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape[1:] != (NUM_PIXELS,):
        raise DataError(
            f"load_cifar10: {path} has data of {kind}, and so is of another kind; expected uint8 of shape "
            f"(n, {NUM_PIXELS}). {DOWNLOAD}"
        )
    if not _is_list_of(labels, int) or len(labels) != len(data) or len(data) == 0:
        found = f"{len(labels)} labels" if _is_list_of(labels, int) else f"labels of {type(labels).__name__}"
        raise DataError(
            f"load_cifar10: {path} has {found} and {len(data)} images; expected a list of as many whole "
            f"numbers as images, and at least one. {DOWNLOAD}"
        )
    try:
        numbers = np.asarray(labels, dtype=np.int64)
    except OverflowError as error:
        raise DataError(f"load_cifar10: {path} has a label beyond 64 bits. {DOWNLOAD}") from error
    _check_labels(path, numbers)
    return LabelledPixels(data.reshape(-1, *SHAPE), numbers)


def read_class_names(path: Path) -> tuple[str, ...]:
    """Return the names in batches.meta of the Python version, in the order of their numbers.

    Raises:
        DataError: the file is truncated, or holds other than ten names.
    """
    names = _entry(path, _read_pickle(path), "label_names")
    texts = [name.decode("latin1") if isinstance(name, bytes) else name for name in _as_list(names)]
    if not _is_list_of(texts, str) or len(set(texts)) != NUM_CLASSES:
        raise DataError(
            f"load_cifar10: {path} has label_names {str(names)[:60]}; expected a list of {NUM_CLASSES} "
            f"different names. {DOWNLOAD}"
        )
    return tuple(texts)


class _PlainUnpickler(pickle.Unpickler):
    """Reads numbers, text, lists, dicts and arrays; a file that names anything else is refused."""

    def find_class(self, module: str, name: str) -> Any:
        """Return one of the callables that arrays are pickled with, under the old and the new names."""
        if (module, name) in {("numpy", "ndarray"), ("numpy", "dtype")}:
            return getattr(np, name)
        if name == "_reconstruct" and module in {"numpy.core.multiarray", "numpy._core.multiarray"}:
            return np.empty(0).__reduce__()[0]
        if (module, name) == ("_codecs", "encode"):  # bytes, as Python 3 writes them for Python 2
            return _encode
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no batch of images needs")


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it has bytes in {encoding}, not in latin1")
    return text.encode(encoding)


def _read_pickle(path: Path) -> dict[Any, Any]:
    try:
        with path.open("rb") as file:
            content = _PlainUnpickler(file, encoding="bytes").load()
    except BROKEN_PICKLE as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"load_cifar10: {path} cannot be unpickled ({reason}), and so is truncated or of another kind; "
            f"expected a pickled dict of numbers, text and arrays. {DOWNLOAD}"
        ) from error
    if not isinstance(content, dict):
        raise DataError(
            f"load_cifar10: {path} holds a {type(content).__name__}, and so is of another kind; expected a "
            f"dict. {DOWNLOAD}"
        )
    return content


def _entry(path: Path, content: dict[Any, Any], name: str) -> Any:
    """Return what has this name: bytes in the files of the authors, text in files that Python 3 wrote."""
    for key in (name.encode(), name):
        if key in content:
            return content[key]
    names = [key.decode("latin1") if isinstance(key, bytes) else str(key) for key in content]
    raise DataError(
        f"load_cifar10: {path} has {', '.join(names) or 'nothing'} and no {name}, and so is of another kind. "
        f"{DOWNLOAD}"
    )


def _as_list(values: Any) -> list[Any]:
    return values if isinstance(values, list) else []


def _is_list_of(values: Any, kind: type) -> bool:
    return isinstance(values, list) and all(isinstance(value, kind) for value in values)


def _check_labels(path: Path, labels: NDArray[np.int64]) -> None:
    is_wrong = (labels < 0) | (labels >= NUM_CLASSES)
    if is_wrong.any():
        record = int(is_wrong.argmax())
        raise DataError(
            f"load_cifar10: {path} has label {labels[record]} in record {record}, and so is of another kind; "
            f"expected labels from 0 to {NUM_CLASSES - 1}. {DOWNLOAD}"
        )
