"""`fastclip tune`: start, run, join, inspect and check studies from the command line."""

from fastclip.tuner.cli.commands import tune

__all__ = ["tune"]
