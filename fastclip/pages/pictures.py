"""Pictures with their words: drawn in one style, into a page or into files."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import matplotlib
from matplotlib.figure import Figure

from fastclip.files import atomic
from fastclip.pages import style

View = TypeVar("View")


@dataclass(frozen=True)
class Picture(Generic[View]):
    """One picture of a report: its file name, its words, and the function that draws it."""

    name: str
    title: str
    caption: str
    draw: Callable[[View], Figure]


def embed(picture: Picture[View], view: View) -> dict[str, str]:
    """Return the words, and `source`, a data URL of the picture, or `absent`, why there is none."""
    drawn = _draw(picture, view, style.to_svg)
    words = {"name": picture.name, "title": picture.title, "caption": picture.caption}
    if isinstance(drawn, str):
        return {**words, "absent": drawn}
    return {**words, "source": f"data:image/svg+xml;base64,{base64.b64encode(drawn).decode()}"}


def save_pictures(pictures: Sequence[Picture[View]], view: View, folder: Path) -> list[Path]:
    """Write every picture that has data as a PNG into a folder; return the files."""
    files = []
    for picture in pictures:
        drawn = _draw(picture, view, style.to_png)
        if isinstance(drawn, bytes):
            files.append(folder / f"{picture.name}.png")
            with atomic(files[-1]) as file:
                file.write(drawn)
    return files


def _draw(picture: Picture[View], view: View, render: Callable[[Figure], bytes]) -> bytes | str:
    """Return the rendered picture, or why there is none."""
    with matplotlib.rc_context(style.STYLE):
        try:
            return render(picture.draw(view))
        except style.NothingToDrawError as reason:
            return str(reason)
