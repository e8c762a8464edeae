"""`fastclip bench`: which benchmark to run, and where its results go."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import click
from click.core import ParameterSource

from fastclip import bench
from fastclip.bench.suite import SECTIONS, NoDeviceError, SuiteOptions, run_suite
from fastclip.cli.options import FILE, one_or_more_of, output_file


@click.command("bench")
@click.option(
    "--models",
    multiple=True,
    metavar="NAMES",
    default=[",".join(bench.WORKLOADS)],
    callback=one_or_more_of(bench.WORKLOADS),
    help=f"Parameter lists: {', '.join(bench.WORKLOADS)}. Default: all.",
)
@click.option(
    "--dtype",
    "dtypes",
    multiple=True,
    metavar="NAMES",
    default=["float32,bfloat16"],
    callback=one_or_more_of(bench.DTYPES),
    help=f"Types of the gradients: {', '.join(bench.DTYPES)}. Default: float32,bfloat16.",
)
@click.option(
    "--modes",
    multiple=True,
    metavar="NAMES",
    default=[",".join(bench.MODES)],
    callback=one_or_more_of(bench.MODES),
    help="; ".join(f"{mode}: {meaning}" for mode, meaning in bench.MODES.items()) + ". Default: all.",
)
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="cuda: check and time whichever backends run on this GPU; about ten minutes.",
)
@click.option(
    "--section",
    "sections",
    multiple=True,
    metavar="NAMES",
    callback=one_or_more_of(SECTIONS),
    help=f"With --device cuda, only these: {', '.join(SECTIONS)}.",
)
@click.option("--steps", is_flag=True, help="Time clip and optimizer step together, in float32.")
@click.option("--distributed", is_flag=True, help="Time both over DTensors, on one rank and one thread.")
@click.option("--strategies", is_flag=True, help="Train small networks with each strategy; time its step.")
@click.option("--costs", is_flag=True, help="With --strategies: only time steps; --json keeps its scores.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads for all. Default: torch's.")
@click.option("--quick", is_flag=True, help="A tenth of the time: enough for a look, too noisy to quote.")
@click.option(
    "--time-budget",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help=f"Timing per table row. Default: {bench.Options.time_budget_s}.",
)
@click.option("--json", "json_path", type=FILE, callback=output_file(".json"), help="Write the results here.")
@click.option("--plot", "plot_path", type=FILE, callback=output_file(".png"), help="Draw the results here.")
def run_bench(
    models: tuple[str, ...],
    dtypes: tuple[str, ...],
    modes: tuple[str, ...],
    device: str,
    sections: tuple[str, ...],
    steps: bool,
    distributed: bool,
    strategies: bool,
    costs: bool,
    threads: int | None,
    quick: bool,
    time_budget: float | None,
    json_path: Path | None,
    plot_path: Path | None,
) -> None:
    """Time clipping beside torch.nn.utils, on the parameter lists of real models.

    Everything is compared with float64 first; a wrong result ends the run before anything is timed. The
    default run takes about three minutes on two cores and needs 3 GB of memory.

    \b
    Examples:
      fastclip bench --quick
      fastclip bench --models gpt2,tiny --dtype bfloat16
      fastclip bench --threads 8 --json results.json --plot results.png
      fastclip bench --steps --quick
      fastclip bench --distributed
      fastclip bench --strategies --quick
      fastclip bench --device cuda --quick
      fastclip bench --device cuda --section clips --section steps --json gpu.json
    """
    if device == "cuda":
        _bench_gpu(sections, quick, json_path)
        return
    if sections:
        raise click.UsageError("--section: only with --device cuda.")
    from rich.console import Console

    from fastclip.bench import table
    from fastclip.bench.isolation import apart
    from fastclip.bench.progress import ConsoleProgress
    from fastclip.bench.results import save

    alone = [n for n, given in (("--distributed", distributed), ("--strategies", strategies)) if given]
    if alone and (len(alone) > 1 or steps or (distributed and plot_path is not None)):
        raise click.UsageError(
            f"{' and '.join(alone)}: a run is of one kind, and there is no picture of --distributed; "
            f"expected one of --steps, --distributed and --strategies."
        )
    if distributed:
        _bench_distributed(threads, quick, time_budget, json_path)
        return
    if costs and not (strategies and json_path is not None and json_path.is_file() and plot_path is None):
        raise click.UsageError(
            "--costs times steps for a file that has the scores; expected --strategies and --json with one "
            "that is there, and no --plot."
        )
    if costs:
        _time_strategies(threads, quick, time_budget, json_path)
        return
    if strategies:
        _bench_strategies(threads, quick, time_budget, json_path, plot_path)
        return
    if steps:
        if plot_path is not None:
            raise click.BadParameter("there is no picture of --steps.", param_hint="--plot")
        _bench_steps(models, threads, quick, time_budget, json_path)
        return
    if plot_path is not None:
        from fastclip.bench.plot import save_plot  # before minutes of work, should matplotlib be missing
    chosen = bench.Options(models, dtypes, modes)
    if quick:
        chosen = dataclasses.replace(chosen, time_budget_s=chosen.time_budget_s / 10)
    if time_budget is not None:
        chosen = dataclasses.replace(chosen, time_budget_s=time_budget)
    if threads is not None:
        chosen = dataclasses.replace(chosen, threads=threads)
    try:
        results = bench.run(chosen, progress=ConsoleProgress(Console(stderr=True)), apply=apart)
    except bench.CheckError as error:
        raise click.ClickException(f"nothing was timed, the check against float64 failed: {error}") from error
    table.console().print(table.render(results))
    if json_path is not None:
        save(results, json_path)
        click.echo(f"wrote {json_path}")
    if plot_path is not None:
        save_plot(results, plot_path)
        click.echo(f"wrote {plot_path}")


def _bench_gpu(sections: tuple[str, ...], quick: bool, json_path: Path | None) -> None:
    context = click.get_current_context()
    others = set(context.params) - {"device", "sections", "quick", "json_path"}
    given = [n for n in others if context.get_parameter_source(n) is not ParameterSource.DEFAULT]
    names = {option.name: option.opts[0] for option in context.command.params}
    if given:
        raise click.UsageError(
            f"{', '.join(sorted(names[name] for name in given))}: not with --device cuda, whose workloads "
            f"are its own; expected --section, --quick and --json."
        )
    try:
        sys.exit(run_suite(SuiteOptions(sections, quick=quick, json_path=json_path)))
    except NoDeviceError as error:
        raise click.ClickException(f"--device cuda: {error}") from error


def _bench_distributed(
    threads: int | None, quick: bool, time_budget: float | None, json_path: Path | None
) -> None:
    from fastclip.bench import table
    from fastclip.bench.distributed import run_distributed
    from fastclip.bench.results import write_json

    budget = time_budget or (0.25 if quick else 2.5)
    results = run_distributed(threads=threads or 1, time_budget_s=budget)
    table.console().print(table.render_distributed(results))
    if json_path is not None:
        write_json(json_path, results)
        click.echo(f"wrote {json_path}")


def _bench_strategies(
    threads: int | None,
    quick: bool,
    time_budget: float | None,
    json_path: Path | None,
    plot_path: Path | None,
) -> None:
    from rich.console import Console

    from fastclip.bench import table
    from fastclip.bench.results import write_json
    from fastclip.demo import comparison_table
    from fastclip.demo.comparison import compare, picture

    if plot_path is not None:  # the quickest, and the first to fail should matplotlib be missing
        picture(plot_path)
        click.echo(f"wrote {plot_path}")
    console = Console(stderr=True)
    results = compare(
        seeds=(0,) if quick else (0, 1, 2),
        epochs=2 if quick else None,
        threads=threads,
        time_budget_s=time_budget or (6.0 if quick else 60.0),
        told=lambda line: console.print(line, style="dim", highlight=False, soft_wrap=True),
    )
    table.console().print(comparison_table.render(results))
    if json_path is not None:
        write_json(json_path, results.content())
        click.echo(f"wrote {json_path}")


def _time_strategies(
    threads: int | None, quick: bool, time_budget: float | None, json_path: Path | None
) -> None:
    from fastclip.bench import table
    from fastclip.bench.results import write_json
    from fastclip.demo import comparison_table
    from fastclip.demo.comparison import time_again

    assert json_path is not None  # `run_bench` has looked
    content = json.loads(json_path.read_text(encoding="utf-8"))
    costs = time_again(content, threads=threads, time_budget_s=time_budget or (6.0 if quick else 60.0))
    table.console().print(comparison_table.render_costs(costs))
    write_json(json_path, content)
    click.echo(f"wrote {json_path}")


def _bench_steps(
    models: tuple[str, ...],
    threads: int | None,
    quick: bool,
    time_budget: float | None,
    json_path: Path | None,
) -> None:
    from rich.console import Console

    from fastclip.bench import table
    from fastclip.bench.isolation import apart
    from fastclip.bench.progress import ConsoleProgress
    from fastclip.bench.results import save
    from fastclip.bench.steps import StepOptions, run_steps

    options = StepOptions()
    if set(models) != set(bench.WORKLOADS):
        options = dataclasses.replace(options, models=models)
    budget = time_budget or (options.time_budget_s / 10 if quick else options.time_budget_s)
    options = dataclasses.replace(options, time_budget_s=budget, threads=threads or options.threads)
    try:
        results = run_steps(options, progress=ConsoleProgress(Console(stderr=True)), apply=apart)
    except bench.CheckError as error:
        raise click.ClickException(f"the check against float64 failed: {error}") from error
    table.console().print(table.render_steps(results))
    if json_path is not None:
        save(results, json_path)
        click.echo(f"wrote {json_path}")
