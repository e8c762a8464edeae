"""The `fastclip` command: info, bench, demo, tune, monitor."""

from __future__ import annotations

import json
import sys

import fastclip

# Module that may be missing -> the extra that brings it.
EXTRAS = {
    **{"click": "cli", "rich": "cli", "matplotlib": "report", "jinja2": "report"},
    **{"PIL": "demo", "optuna": "demo", "sklearn": "demo"},
}
MISSING = (
    "fastclip: {module} is not installed. Install what this command needs: pip install 'fastclip[{extra}]'"
)
USAGE_ERROR = 2

try:
    import click

    from fastclip.cli.bench import run_bench
    from fastclip.cli.demo import demo
    from fastclip.monitor.cli import monitor
except ModuleNotFoundError:
    print(MISSING.format(module="click", extra=EXTRAS["click"]), file=sys.stderr)
    sys.exit(USAGE_ERROR)


def main() -> None:
    """Run the command line; a missing extra ends it with the extra's name and exit code 2."""
    try:
        cli()
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module not in EXTRAS:
            raise
        print(MISSING.format(module=module, extra=EXTRAS[module]), file=sys.stderr)
        sys.exit(USAGE_ERROR)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(fastclip.__version__, prog_name="fastclip")
def cli() -> None:
    """Gradient clipping for PyTorch that is nearly free and numerically right.

    \b
    fastclip info            what is installed, and which kernels will run
    fastclip bench --quick   how fast clipping is here, beside torch's own
    fastclip demo            watch clipping rescue a network that explodes, and a NaN batch skipped
    fastclip tune --help     find rate, threshold and initialisation together
    fastclip monitor RUN     look at a training that fastclip.Monitor watches
    """


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def info(as_json: bool) -> None:
    """Show versions, hardware, and each backend with the reason why it is or is not usable.

    \b
    Examples:
      fastclip info
      fastclip info --json | jq .backends
    """
    from fastclip.bench import report

    try:
        facts = report.installation()
    except ValueError as error:  # of a variable such as FASTCLIP_BACKEND
        raise click.ClickException(str(error)) from error
    if as_json:
        click.echo(json.dumps(facts, indent=1))
    else:
        from rich.console import Console

        Console().print(report.render(facts))


@cli.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def tune(arguments: tuple[str, ...]) -> None:
    """Find learning rate, threshold and initialisation by cross-validation: see `fastclip tune --help`."""
    # The tuner takes seconds to load, which the other commands need not wait for.
    try:
        from fastclip.tuner.cli import tune as tuner
    except ImportError as error:
        raise click.UsageError(str(error)) from error
    tuner.main(arguments, prog_name="fastclip tune")


for command in (run_bench, demo, monitor):
    cli.add_command(command)
