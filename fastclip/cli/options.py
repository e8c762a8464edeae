"""What options of several commands have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import click


def one_or_more_of(choices: Iterable[str]) -> Callable[..., tuple[str, ...]]:
    """Return an option's callback that splits at commas and turns down names that are not choices."""
    known = tuple(choices)

    def convert(context: click.Context, option: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
        names = [name.strip() for value in values for name in value.split(",")]
        for name in names:
            if name not in known:
                raise click.BadParameter(f"{name!r} is unknown; expected one or more of {', '.join(known)}.")
        return tuple(dict.fromkeys(names))

    return convert


def output_file(suffix: str) -> Callable[..., Path | None]:
    """Return an option's callback that makes sure, before any work, that the file can be written."""

    def convert(context: click.Context, option: click.Parameter, path: Path | None) -> Path | None:
        if path is None:
            return None
        if path.suffix != suffix:
            raise click.BadParameter(f"{str(path)!r} does not end in {suffix}.")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise click.BadParameter(f"{str(path.parent)!r} cannot be made: {error.strerror}.") from error
        return path

    return convert


FILE = click.Path(dir_okay=False, writable=True, path_type=Path)
