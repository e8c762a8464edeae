"""Errors of the tuner. A caller's mistake is a plain ValueError or TypeError."""

from __future__ import annotations

from typing import Any


class ResumeError(ValueError):
    """An output directory or a study cannot be continued with the settings given."""


class ConfigError(ValueError):
    """A configuration file, or an override of it, is wrong."""


class AllTrialsFailedError(RuntimeError):
    """No trial of the study ended with a score."""


class AllTrialsExplodedError(AllTrialsFailedError):
    """Every trial of the study exploded.

    Attributes:
        explosions: One dict per exploded fold, as in `TunerCV.explosions_`.
    """

    def __init__(self, message: str, explosions: list[dict[str, Any]]) -> None:
        super().__init__(message)
        self.explosions = explosions


class NonfiniteDataError(AllTrialsExplodedError, ValueError):
    """Inputs or targets hold nan or inf, with which every trial would explode; none was trained."""

    def __init__(self, message: str) -> None:
        super().__init__(message, [])


class WarmupExplodedError(RuntimeError):
    """The unclipped warm-up of `suggest_clip_range` exploded.

    Attributes:
        lr_to_try: A rate at which the same warm-up stayed finite, or None when none was found.
    """

    def __init__(self, message: str, lr_to_try: float | None) -> None:
        super().__init__(message)
        self.lr_to_try = lr_to_try


class MainGuardError(RuntimeError):
    """A script starts worker processes outside of `if __name__ == "__main__":`, and they run it again."""


class RefitExplodedError(RuntimeError):
    """Training on all data exploded for each of the best trials."""
