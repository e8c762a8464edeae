"""Templates of pages, which extend `page.html.jinja`."""

from __future__ import annotations

from typing import Any

import jinja2

DIGITS = 4


def template(package: str, name: str) -> jinja2.Template:
    """Return a template from the folder `templates` of a package."""
    folders = [jinja2.PackageLoader(owner, "templates") for owner in (package, "fastclip.pages")]
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader(folders),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["short"] = short
    return environment.get_template(name)


def short(value: Any) -> str:
    """Return a value as a reader wants it: numbers with four digits, nothing as a dash."""
    if value is None:
        return "–"
    return f"{value:.{DIGITS}g}" if isinstance(value, float) else str(value)
