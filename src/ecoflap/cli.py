"""The command line: each command is a few lines over the Python interface."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from ecoflap.errors import EcoflapError
from ecoflap.options import with_recipe_options
from ecoflap.progress import Progress, Silent
from ecoflap.recipe import Recipe
from ecoflap.terminal import progress_on

app = typer.Typer(
    name="ecoflap",
    help="Make a vision-language model sparse: importance per layer, allocation, local pruning (ECoFLaP).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no table.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="The run directory.")]
MODEL_FIELDS = ("device", "dtype", "trust_remote_code")
PART_FIELDS = ("include", "exclude", "towers")
DATA_FIELDS = ("calibration", "columns", "prompt", "objective", "samples", "batch_size", "sequence_length", "seed")
SHARE_FIELDS = ("sparsity", "max_sparsity", "min_sparsity", "granularity", "aggregate", "budget", "tower_sparsity")
SCORE_FIELDS = ("importance", "importance_options", "importance_samples")


def _progress(quiet: bool) -> Progress:
    return Silent() if quiet else progress_on(Console(stderr=True))


def _print_json(data: Any) -> None:
    sys.stdout.write(json.dumps(data, indent=1, allow_nan=False) + "\n")


@app.command()
@with_recipe_options()
def prune(
    recipe: Recipe,
    output: Output = Path("ecoflap-run"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run that is there.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run that is there.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Prune MODEL and leave a run directory: the sparse model, scores, allocation, metrics and report.html."""
    from ecoflap.pipeline import run_recipe
    from ecoflap.report import summary_table

    run = run_recipe(recipe, output, overwrite=overwrite, resume=resume, progress=_progress(quiet or as_json))
    if as_json:
        _print_json({"run": str(run), **json.loads((run / "metrics.json").read_text("utf-8"))})
    elif not quiet:
        console = Console()
        console.print(summary_table(run))
        console.print(
            f"model   {run / 'model'}\nreport  {run / 'report.html'}", markup=False, highlight=False, soft_wrap=True
        )


@app.command()
@with_recipe_options(*MODEL_FIELDS, *PART_FIELDS, "calibration", "columns", "prompt", "sequence_length")
def inspect(recipe: Recipe, as_json: Json = False) -> None:
    """Show towers, blocks and layers of MODEL: what is prunable, and what stays dense and why."""
    from ecoflap.commands import inspect_model
    from ecoflap.listings import anatomy_json, anatomy_tables

    anatomy, note = inspect_model(recipe)
    if as_json:
        _print_json(anatomy_json(anatomy))
        return
    console = Console()
    for table in anatomy_tables(anatomy, note):
        console.print(table)


@app.command()
@with_recipe_options(*MODEL_FIELDS, *PART_FIELDS, *DATA_FIELDS, *SCORE_FIELDS)
def importance(
    recipe: Recipe,
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write.")] = Path("importance.json"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
    quiet: Quiet = False,
) -> None:
    """Stage 1 alone: measure a score for each layer of MODEL."""
    from ecoflap.commands import measure_model, refuse_existing
    from ecoflap.files import write_json

    refuse_existing(output, overwrite)
    write_json(output, measure_model(recipe, _progress(quiet)).to_json())
    if not quiet:
        typer.echo(f"scores  {output}")


@app.command()
def allocate(
    scores: Annotated[Path, typer.Argument(metavar="IMPORTANCE", help="An importance.json.", show_default=False)],
    sparsity: Annotated[float, typer.Option(help="Fraction of the prunable weights to set to zero.")] = 0.5,
    max_sparsity: Annotated[float | None, typer.Option(help="Cap of a group; default: sparsity + 0.1.")] = None,
    min_sparsity: Annotated[float, typer.Option(help="Floor of a group's sparsity.")] = 0.0,
    granularity: Annotated[str, typer.Option(help="What shares one sparsity: block, layer, tower.")] = "block",
    aggregate: Annotated[str, typer.Option(help="A group's score: sum or mean of its layers'.")] = "sum",
    budget: Annotated[str, typer.Option(help="global, or tower: each tower meets the sparsity itself.")] = "global",
    tower_sparsity: Annotated[
        list[str] | None, typer.Option(help="Sparsity of a tower or modality, as key=value; may be repeated.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write; default: beside it.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Scores to sparsities: instantaneous, needs neither model nor data."""
    from ecoflap.commands import allocate_file

    allocation, target = allocate_file(
        scores,
        output,
        overwrite,
        sparsity=sparsity,
        max_sparsity=max_sparsity,
        min_sparsity=min_sparsity,
        granularity=granularity,
        aggregate=aggregate,
        budget=budget,
        tower_sparsity=tower_sparsity or [],
    )
    if as_json:
        _print_json(allocation.to_json())
    elif not quiet:
        from ecoflap.listings import allocation_table

        Console().print(allocation_table(allocation))
        typer.echo(f"allocation  {target}")


@app.command()
@with_recipe_options(*MODEL_FIELDS, "task", "test", "test_samples", "batch_size", "sequence_length", "seed")
def evaluate(
    recipe: Recipe,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write the results to this file.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Measure MODEL on a task: vqa, perplexity."""
    from ecoflap.commands import evaluate_model, refuse_existing
    from ecoflap.files import write_json
    from ecoflap.listings import quality_table

    if output is not None:
        refuse_existing(output, overwrite)
    results = evaluate_model(recipe, _progress(quiet or as_json))
    if output is not None:
        write_json(output, {"format": 1, "model": recipe.model, "results": results})
    if as_json:
        _print_json(results)
    elif not quiet:
        Console().print(quality_table(results))


@app.command()
def report(run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.", show_default=False)]) -> None:
    """Write report.html of RUN again, from its files."""
    from ecoflap.report import write_report

    typer.echo(f"report  {write_report(run)}")


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.", is_eager=True)] = False,
) -> None:
    if version:
        from ecoflap import __version__

        typer.echo(f"ecoflap {__version__}")
        raise typer.Exit()


def main() -> NoReturn:
    """Run the command line: exit code 0, 1 (failed), 2 (bad input), 130 or 143 (stopped)."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(_stopped(143)))
    try:
        app(standalone_mode=False)
    except EcoflapError as error:
        _fail(str(error), error.exit_code)
    except typer.TyperException as error:
        _fail(error.format_message(), 2)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(_stopped(130))
    sys.exit(0)


def _fail(message: str, code: int) -> NoReturn:
    sys.stderr.write(f"ecoflap: {' '.join(message.split())}\n")
    sys.exit(code)


def _stopped(code: int) -> int:
    sys.stderr.write("ecoflap: stopped; the same command with --resume goes on from here\n")
    return code
