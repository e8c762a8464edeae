"""Progress: a bar for someone who watches, lines for a log."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import track

T = TypeVar("T")


class ConsoleProgress:
    """Shows each item as it passes, on the console given."""

    def __init__(self, console: Console) -> None:
        """Take the console; whether it is a terminal decides on the form."""
        self.console = console

    def __call__(self, items: Iterable[T], total: int, title: str) -> Iterator[T]:
        """Pass items on."""
        if self.console.is_terminal:
            yield from track(items, title, total, console=self.console, transient=True)
            return
        for number, item in enumerate(items, 1):
            self.console.print(f"{title} {number}/{total}  {item}", soft_wrap=True, highlight=False)
            yield item
