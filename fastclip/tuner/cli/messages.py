"""What a command says when it ends early: one message, and no traceback."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import click
from optuna.exceptions import StorageInternalError
from sqlalchemy.exc import SQLAlchemyError

from fastclip.tuner.errors import AllTrialsFailedError, RefitExplodedError, WarmupExplodedError

EXIT_INTERRUPTED = 130

TOLD = (ValueError, TypeError, ImportError, AllTrialsFailedError, RefitExplodedError, WarmupExplodedError)
STORAGE = (OSError, StorageInternalError, SQLAlchemyError)


@contextmanager
def errors(how_to_go_on: str) -> Iterator[None]:
    """Show the tuner's errors and those of disks and databases without a traceback.

    Args:
        how_to_go_on: Said after an interruption, which ends the command as a shell expects, and after what
            happens to a disk or a database.
    """
    try:
        yield
    except KeyboardInterrupt:
        click.echo(f"stopped. {how_to_go_on}", err=True)
        sys.exit(EXIT_INTERRUPTED)
    except TOLD as error:
        raise click.ClickException(str(error)) from error
    except STORAGE as error:
        cause = error.__cause__ if isinstance(error, StorageInternalError) and error.__cause__ else error
        first = str(cause).strip().splitlines()[0].rstrip(".")
        raise click.ClickException(f"{first}. {how_to_go_on}".strip()) from error
