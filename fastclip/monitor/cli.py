"""`fastclip monitor`: show, report on and learn from what a monitor has written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from fastclip.monitor.reading import Reader, read
from fastclip.monitor.suggestion import suggest as propose


class _ShowByDefault(click.Group):
    """A group in which `monitor RUN` is `monitor show RUN`."""

    def parse_args(self, context: click.Context, arguments: list[str]) -> list[str]:
        """Put `show` before arguments that begin with neither a command nor a request for help."""
        if arguments and arguments[0] not in self.commands and arguments[0] not in context.help_option_names:
            arguments = ["show", *arguments]
        return super().parse_args(context, arguments)


RUN = click.argument("run", type=click.Path(path_type=Path))


@click.group(cls=_ShowByDefault)
def monitor() -> None:
    """Look at a run that fastclip.Monitor writes, also while it goes on.

    \b
    Examples:
      fastclip monitor runs/first --follow
      fastclip monitor report runs/first
      fastclip monitor suggest runs/first
    """


@monitor.command()
@RUN
@click.option("--follow", is_flag=True, help="Go on as the run does, until Ctrl-C.")
def show(run: Path, follow: bool) -> None:
    """Show norms against the threshold, the clipped share, skips and events; `monitor RUN` does the same."""
    from rich.console import Console

    from fastclip.monitor import terminal

    with _usage_errors():
        reader = Reader(run)
        if follow:
            terminal.follow(Console(), reader)
        else:
            reader.update()
            terminal.show(Console(), reader.run())


@monitor.command()
@RUN
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File. Default: report.html there.",
)
@click.option("--plots", type=click.Path(file_okay=False, path_type=Path), help="Also write PNGs here.")
def report(run: Path, output: Path | None, plots: Path | None) -> None:
    """Write one HTML file: norms and thresholds, a map of the layers, a histogram, what happened."""
    from fastclip.monitor.report import write_plots, write_report

    with _usage_errors():
        seen = read(run)
        click.echo(f"wrote {write_report(seen, output or seen.path.parent / 'report.html')}")
        for path in write_plots(seen, plots) if plots else []:
            click.echo(f"wrote {path}")


@monitor.command()
@RUN
def suggest(run: Path) -> None:
    """Propose max_norm, or a strategy, from the norms that the run has seen."""
    from rich.console import Console

    from fastclip.monitor import terminal

    with _usage_errors():
        found = propose(run)
    console = Console()
    console.print(
        f"{found.num_steps} norms; the median of the last third is {found.drift:.2f} times that of the first."
    )
    console.print(terminal.suggestions(found))
    console.print(f"Begin with {found.best.code}", markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _usage_errors() -> Iterator[None]:
    """Say in one line what the caller got wrong."""
    try:
        yield
    except (FileNotFoundError, ValueError) as error:
        raise click.UsageError(str(error)) from error
