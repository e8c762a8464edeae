"""The tuner's commands, called as from a shell."""

from __future__ import annotations

from click.testing import CliRunner, Result

from fastclip.tuner.cli import tune

TUNE = "from fastclip.tuner.cli import tune; tune()"


def invoke(*arguments: object) -> Result:
    """Run `fastclip tune`; what it raises beyond an exit is raised here."""
    result = CliRunner().invoke(tune, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result
