"""Pages as their readers see them, for the tests of reports."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path


class Page(HTMLParser):
    """What a browser would fetch, the picture per section, and the text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.pictures: dict[str, str] = {}
        self.text = ""
        self._section = ""
        self.feed(path.read_text())
        self.close()

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.tags.append((tag, found))
        if tag == "section":
            self._section = found.get("id") or ""
        self.sources += [found[name] for name in ("src", "href", "srcset", "data") if found.get(name)]
        if tag == "img":
            self.pictures[self._section] = found["src"]

    def handle_data(self, data):
        self.text += data
