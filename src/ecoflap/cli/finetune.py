"""The command that trains a sparse model further: finetune."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from ecoflap.cli.app import Command, Json, Quiet, app, flag, output_option, print_json, progress_to, say_line
from ecoflap.cli.options import with_recipe_options
from ecoflap.cli.terminal import print_lines, standard_error, standard_output
from ecoflap.run.finetune.folder import FinetuneDirectory
from ecoflap.run.finetune.recipe import NOT_HERE, Finetune
from ecoflap.run.names import METRICS, MODEL, REPORT
from ecoflap.run.recipe import FILE_ONLY

FIELDS = tuple(name for name in Finetune.model_fields if name not in {"model", *NOT_HERE, *FILE_ONLY})


@app.command(
    cls=Command, short_help="Train a sparse model further while its zeros stay; with a page of before and after."
)
@with_recipe_options(*FIELDS, recipe=Finetune)
def finetune(
    recipe: Finetune,
    output: Annotated[
        Path, output_option("The folder to write. Default: ecoflap-finetune.")
    ] = Path("ecoflap-finetune"),
    overwrite: Annotated[bool, flag("--overwrite", text="Replace the fine-tuning that is there.")] = False,
    resume: Annotated[bool, flag("--resume", text="Go on from the last checkpoint of the one that is there.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Train the sparse model of RUN, or MODEL, further while its zeros stay exactly zero.

    A part of the data is held out, and training stops when its loss no longer falls. The default
    dense model, tests, prompt and objective are those of the run.

    Examples:
        ecoflap finetune runs/first --train train.parquet --epochs 5 --output tuned/first
        ecoflap finetune runs/first --train train.parquet --distill 1 --output tuned/distilled
        ecoflap finetune path/to/pruned --train train.jsonl --tune lora --rank 32 --test held-out.jsonl --task vqa
    """
    told(recipe, output, overwrite=overwrite, resume=resume, quiet=quiet, as_json=as_json)


def told(recipe: Finetune, output: Path, *, overwrite: bool, resume: bool, quiet: bool, as_json: bool) -> None:
    """Run a training and print its result."""
    progress = progress_to(quiet or as_json)
    # Checked before anything heavy is imported, so that a folder in use is reported at once.
    examined = FinetuneDirectory.examine(output, recipe.resolved(), overwrite=overwrite, resume=resume)
    if examined.complete:
        if not quiet:
            standard_error().print(f"{output} is complete: nothing to resume", markup=False, highlight=False)
    else:
        from ecoflap.run.finetune.checks import check_finetune

        check_finetune(recipe.resolved())  # before slow imports
    from ecoflap.run.finetune.pipeline import run_finetune

    say = None if quiet or as_json else say_line
    folder = run_finetune(recipe, output, overwrite=overwrite, resume=resume, progress=progress, say=say)
    metrics = json.loads((folder / METRICS).read_text("utf-8"))
    if as_json:
        print_json({"folder": str(folder), **metrics})
    elif not quiet:
        from ecoflap.cli.tables import finetune_table, stages_table

        standard_output().print(finetune_table(folder))
        standard_output().print(stages_table(folder))
        print_lines(f"model   {folder / MODEL}\nreport  {folder / REPORT}")
