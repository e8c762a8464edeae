"""What is raised for a data set that cannot be read, and how its entries are told."""

from collections.abc import Sequence

NAMED = 10
"""Entries that a message names; of the others it says how many there are."""


class DataError(ValueError):
    """A file or folder is missing, truncated, or holds something else; the message names it."""


def told(unreadable: Sequence[str]) -> str:
    """Return how many entries are unreadable, the first of them, and the number of the rest."""
    rest = len(unreadable) - NAMED
    noun = "entry" if len(unreadable) == 1 else "entries"
    named = ", ".join(unreadable[:NAMED]) + (f", and {rest} more" if rest > 0 else "")
    return f"{len(unreadable)} unreadable {noun}: {named}"
