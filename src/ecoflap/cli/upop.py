"""The command that removes channels while a dense model is trained: upop."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from ecoflap.cli.app import Command, Json, Quiet, app, flag, output_option
from ecoflap.cli.finetune import told
from ecoflap.cli.options import with_recipe_options
from ecoflap.run.finetune.upop_recipe import HIDDEN, UPop
from ecoflap.run.recipe import FILE_ONLY

FIELDS = tuple(name for name in UPop.model_fields if name not in {"model", *UPop.left_out, *HIDDEN, *FILE_ONLY})


@app.command(cls=Command, short_help="Remove attention and feed-forward channels while training (UPop).")
@with_recipe_options(*FIELDS, recipe=UPop)
def upop(
    recipe: UPop,
    output: Annotated[
        Path, output_option("The folder to write. Default: ecoflap-upop.")
    ] = Path("ecoflap-upop"),
    overwrite: Annotated[bool, flag("--overwrite", text="Replace the training that is there.")] = False,
    resume: Annotated[bool, flag("--resume", text="Go on from the last checkpoint of the one that is there.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Remove channels of attentions and feed-forward networks while MODEL is trained, then train what stays.

    One ranking over all towers decides which channels leave, by gradients of masks that are summed while the ratio
    grows (UPop, arXiv 2301.13741). Where the configuration can say the new sizes, the saved model is smaller.

    Examples:
        ecoflap upop --train train.parquet --sparsity 0.5 --output upop/2x
        ecoflap upop path/to/blip2 --train train.jsonl --sparsity 0.75 --epochs 5 --learning-rate 3e-4
    """
    told(recipe, output, overwrite=overwrite, resume=resume, quiet=quiet, as_json=as_json)
