"""`fastclip demo`: what it takes from the command line."""

from __future__ import annotations

import sys
from pathlib import Path

import click


@click.command()
@click.option(
    "--task",
    type=click.Choice(["digits", "charlm", "cifar10", "imagefolder", "mnist", "text"]),
    default="digits",
    show_default=True,
    help="digits and charlm bring their data, the others read --data.",
)
@click.option(
    "--data",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of CIFAR-10, of images or texts in a folder per class, or of MNIST's idx files.",
)
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("demo-output"),
    show_default=True,
    help="Directory for the picture and the search.",
)
@click.option(
    "--epochs", type=click.IntRange(min=1), help="Of each training. Default: the task's own number."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of data, weights and batches.")
@click.option(
    "--model",
    type=click.Choice(
        ["three-conv", "four-conv", "batch-norm", "simple", "deep-mlp", "embedding-bag", "recurrent"]
    ),
    help="Network; the last two sort texts, the others images. Default: the task's own.",
)
@click.option(
    "--size", type=click.IntRange(min=1), help="Pixels of a side to resize own images to. Default: 32."
)
@click.option(
    "--skip-unreadable",
    is_flag=True,
    help="Leave own files that are broken or foreign out, and list them.",
)
@click.option(
    "--search/--no-search", default=None, help="End with a search. Default: only the digits, which are small."
)
def demo(
    task: str,
    data: Path | None,
    output: Path,
    epochs: int | None,
    seed: int,
    model: str | None,
    size: int | None,
    skip_unreadable: bool,
    search: bool | None,
) -> None:
    """Train at a rate that explodes: unclipped, with fastclip, with torch. Then search for a better one.

    The digits are also trained with one batch of NaN, which fastclip skips, and end with the search. Takes
    about a minute on two cores and downloads nothing. The exit code is 0 if clipping rescued the network,
    the NaN batch was skipped, and the search found parameters that train it well. Of a folder's images a
    sample is taken; whether clipping rescued the network is told by what guessing reaches, and the exit code
    is 0. With --search minutes more: how many is said before it begins.

    \b
    Examples:
      fastclip demo
      fastclip demo --task charlm --seed 3
      fastclip demo --task imagefolder --data photos --output pictures --search
      fastclip demo --task cifar10 --data downloads --model batch-norm
    """
    from fastclip.demo import DataError, run

    try:
        code = run(
            output,
            task=task,
            data=data,
            epochs=epochs,
            seed=seed,
            search=search,
            model=model,
            size=size,
            skip_unreadable=skip_unreadable,
        )
    except DataError as error:
        raise click.UsageError(str(error)) from error
    sys.exit(code)
