"""Files written whole or not at all."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np


@contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """Yield a binary file that takes the place of path when the block ends well, and vanishes otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not tempfile: what it makes is for its owner alone, and a report is to be shown to others.
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with open(unfinished, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def write_whole(path: Path, content: bytes) -> None:
    """Write a file, or replace it, in one step."""
    with atomic(path) as file:
        file.write(content)


def write_json(path: Path, value: Any) -> None:
    """Write JSON; non-finite numbers become the strings "inf", "-inf" and "nan", which float() reads back."""
    write_whole(path, json.dumps(plain(value), indent=1, allow_nan=False).encode())


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows under the union of their keys, in the order in which the keys first occur."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, text.getvalue().encode())


def plain(value: Any) -> Any:
    """Return a value as JSON can hold it."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, (np.integer, np.bool_)):
        return value.item()
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else str(float(value))
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return repr(value)
