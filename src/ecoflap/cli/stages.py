"""Commands for single stages: inspect, importance, allocate, evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ecoflap.cli.app import (
    DATA_FIELDS,
    MODEL_FIELDS,
    PART_FIELDS,
    SCORE_FIELDS,
    SHARE_FIELDS,
    SOURCE_FIELDS,
    TEST_FIELDS,
    Command,
    Json,
    Overwrite,
    Quiet,
    app,
    flag,
    output_option,
    print_json,
    progress_to,
    say_line,
)
from ecoflap.cli.options import with_recipe_options
from ecoflap.cli.terminal import messages, print_lines, standard_output
from ecoflap.run.recipe import Recipe


@app.command(cls=Command, short_help="Towers, blocks and layers: what is prunable, what stays dense and why.")
@with_recipe_options(*MODEL_FIELDS, *PART_FIELDS, *SOURCE_FIELDS, "sequence_length")
def inspect(recipe: Recipe, as_json: Json = False) -> None:
    """Show towers, blocks and layers of MODEL: what is prunable, and what stays dense and why.

    With calibration data one forward is watched, which gives the true order and finds what never runs; of mixtures, the
    tokens that routers send to each expert are counted on all samples.

    Examples:
        ecoflap inspect
        ecoflap inspect path/to/blip2 --calibration vqa.jsonl
        ecoflap inspect path/to/llama --json
    """
    from ecoflap.cli.anatomy_tables import anatomy_json, anatomy_tables, experts_tables
    from ecoflap.run.commands import inspect_model

    anatomy, note, routing = inspect_model(recipe)
    if as_json:
        print_json(anatomy_json(anatomy) | ({"experts": routing} if routing else {}))
        return
    for table in (*anatomy_tables(anatomy, note), *experts_tables(routing)):
        standard_output().print(table)


@app.command(cls=Command, short_help="Stage 1 alone: a score for each layer.")
@with_recipe_options(*MODEL_FIELDS, *PART_FIELDS, *DATA_FIELDS, *SCORE_FIELDS)
def importance(
    recipe: Recipe,
    output: Annotated[Path, output_option("File to write. Default: importance.json.", "FILE")] = Path(
        "importance.json"
    ),
    overwrite: Overwrite = False,
    resume: Annotated[bool, flag("--resume", text="Go on with a measurement that was interrupted.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Stage 1 alone: measure a score for each layer of MODEL.

    Examples:
        ecoflap importance --output importance.json
        ecoflap importance path/to/llama --calibration prose.txt --sequence-length 512 --importance-samples 64
        ecoflap importance path/to/llama --calibration prose.txt --importance first-order
    """
    from ecoflap.run.checks import check_measured
    from ecoflap.run.commands import measure_to

    check_measured(recipe)  # before slow imports
    from ecoflap.support.processes import joined

    progress = progress_to(quiet or as_json)
    with joined() as workers:
        say = None if quiet or as_json or not workers.first else say_line
        scores = measure_to(recipe, output, progress, overwrite=overwrite, resume=resume, workers=workers, say=say)
    if not workers.first:
        return
    if as_json:
        print_json(scores.to_json())
    elif not quiet:
        print_lines(f"scores  {output}")


@app.command(cls=Command, short_help="Scores to sparsities: instantaneous, needs neither model nor data.")
@with_recipe_options(*SHARE_FIELDS, model=False)
def allocate(
    recipe: Recipe,
    scores: Annotated[Path, typer.Argument(metavar="IMPORTANCE", help="An importance.json, or the run that holds it.")],
    output: Annotated[
        Path | None,
        output_option("File to write. Default: allocation.json beside the scores; for a run, in this folder.", "FILE"),
    ] = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Scores to sparsities: instantaneous, needs neither model nor data.

    Examples:
        ecoflap allocate runs/first/importance.json --sparsity 0.6
        ecoflap allocate importance.json --sparsity 0.6 --max-sparsity 0.8 --granularity layer --output layers.json
    """
    from ecoflap.run.commands import allocate_file

    messages.quiet = quiet
    allocation, target = allocate_file(scores, recipe, output, overwrite)
    if as_json:
        print_json(allocation.to_json())
    elif not quiet:
        from ecoflap.cli.tables import allocation_table

        standard_output().print(allocation_table(allocation))
        print_lines(f"allocation  {target}")


@app.command(cls=Command, short_help="VQA accuracy, CIDEr, recall, perplexity, ..., suites of lm-eval.")
@with_recipe_options(
    *MODEL_FIELDS, *TEST_FIELDS, "classes", "class_prompts", "test_batch_size", "sequence_length", "window_start",
    "seed", aliases={"test_samples": "--limit", "test_batch_size": "--batch-size"},
)  # fmt: skip
def evaluate(
    recipe: Recipe,
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            metavar="MODEL|RUN|FILE",
            show_default=False,
            rich_help_panel="Evaluation",
            help="Also show the difference, on the same samples, from another model, both models of a run, or a file "
            "that --output wrote.",
        ),
    ] = None,
    output: Annotated[Path | None, output_option("Also write the results to this file.", "FILE")] = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Measure MODEL on tasks, or on all evaluations of a recipe.

    Examples:
        ecoflap evaluate
        ecoflap evaluate runs/first/model --task vqa --limit 200 --json
        ecoflap evaluate runs/first/model --task vqa --against runs/second
        ecoflap evaluate path/to/llama --task perplexity --test held-out.txt --sequence-length 2048
        ecoflap evaluate path/to/llama --task multiple-choice --test mmlu.jsonl --task-option shots=5
        ecoflap evaluate path/to/llama --task lm_eval:hellaswag --batch-size 16
        ecoflap evaluate runs/blip2/model --recipe recipes/blip2/blip2-flan-t5-xl.yaml --output metrics.json
    """
    from ecoflap.run.checks import check_evaluated
    from ecoflap.run.commands import evaluate_model, refuse_existing
    from ecoflap.run.directory import places_of

    if output is not None:
        refuse_existing(output, overwrite, [against, *(place for _, place in places_of(recipe))])
    check_evaluated(recipe)  # before slow imports
    from ecoflap.support.processes import joined

    with joined() as workers:
        results = evaluate_model(recipe, progress_to(quiet or as_json), workers, against)
    if not workers.first:
        return
    shown = {
        name: {key: value for key, value in result.items() if key != "samples"} for name, result in results.items()
    }
    if as_json:
        print_json(shown)
    elif not quiet:
        from ecoflap.cli.tables import quality_table

        standard_output().print(quality_table(shown))
    if output is not None:  # after the results are shown: the disk may be full now
        from ecoflap.support.files import write_json

        write_json(output, {"format": 1, "model": recipe.model, "results": results})
