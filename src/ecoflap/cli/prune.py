"""Commands that make sparse models: prune, recover, compare."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from ecoflap.cli.app import (
    DATA_FIELDS,
    GRID_FIELDS,
    MODEL_FIELDS,
    PART_FIELDS,
    PRIVATE,
    TEST_FIELDS,
    Command,
    Json,
    OverwriteRun,
    Quiet,
    ResumeRun,
    app,
    flag,
    output_option,
    print_json,
    progress_to,
    say_line,
)
from ecoflap.cli.options import OUTPUT, with_recipe_options
from ecoflap.cli.packed import model_of, packed_line, packed_to
from ecoflap.cli.terminal import print_lines, standard_error, standard_output
from ecoflap.errors import EcoflapError, InvalidOption
from ecoflap.run.compare.folder import PAGE, TABLE, GridDirectory
from ecoflap.run.compare.recipe import Grid
from ecoflap.run.directory import RunDirectory
from ecoflap.run.manifest import Manifest
from ecoflap.run.names import METRICS, MODEL, PACKED, REPORT
from ecoflap.run.recipe import Recipe
from ecoflap.support.reading import read_json
from ecoflap.support.workers import ALONE, launched


@app.command(cls=Command, short_help="The whole job: a run directory with the sparse model and report.html.")
@with_recipe_options()
def prune(
    recipe: Recipe,
    output: Annotated[Path, output_option("The run directory. Default: ecoflap-run.")] = Path("ecoflap-run"),
    overwrite: OverwriteRun = False,
    resume: ResumeRun = False,
    push_to_hub: Annotated[
        str | None,
        typer.Option("--push-to-hub", metavar="REPO_ID", help="Upload the model with its card to the Hub at the end.",
                     show_default=False, rich_help_panel=OUTPUT),
    ] = None,
    private: Annotated[bool, flag("--private", text=PRIVATE)] = False,
    pack: Annotated[bool, flag("--pack", text="Write the model packed, too: RUN/packed.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Prune MODEL and leave a run directory: the sparse model, scores, allocation, metrics and report.html.

    Examples:
        ecoflap prune --output runs/first
        ecoflap prune path/to/llama --sparsity 0.6 --calibration prose.txt --sequence-length 2048 --test held-out.txt
        ecoflap prune path/to/blip2 --calibration vqa.jsonl --tower-sparsity vision=0.4 --tower-sparsity language=0.6
        ecoflap prune --recipe runs/first/recipe.yaml --sparsity 0.7 --output runs/second
        ecoflap prune path/to/llama --allocation allocation.json --calibration prose.txt
    """
    if (launched() or ALONE).first:
        _check_hub(push_to_hub, private)
    run = _run(recipe, output, overwrite, resume, quiet, as_json)
    if run is None:
        return
    packed = None
    if pack:
        from ecoflap.report import rebuild

        with Manifest(run).writing(f"{PACKED}/"):
            packed = packed_to(str(run / MODEL), run / PACKED, "auto", None, True, recipe.trust_remote_code, quiet)
        rebuild(run)  # the page shows the packed size
    pushed, failure = _pushed(run, push_to_hub, private, bars=not (quiet or as_json))
    more: dict[str, Any] = {} if push_to_hub is None else {"pushed": pushed}
    _tell(run, quiet, as_json, more if packed is None else {**more, "packed": packed})
    if failure is not None:
        raise failure


@app.command(cls=Command, short_help="Fit the remaining weights of a pruned model; its zeros stay.")
@with_recipe_options(
    *MODEL_FIELDS, *PART_FIELDS, *DATA_FIELDS, *TEST_FIELDS, "test_batch_size", "recover_options", "tokens",
    "top_tokens", "expert_tokens", "offload_activations",
)  # fmt: skip
def recover(
    recipe: Recipe,
    dense: Annotated[
        str | None,
        typer.Option("--dense", metavar="DENSE", help="The model that MODEL was pruned from: folder, GGUF file or hub "
                     "id. Default: the embedded model.", show_default=False, rich_help_panel="Model"),
    ] = None,
    output: Annotated[
        Path, output_option("The run directory. Default: ecoflap-recovered.")
    ] = Path("ecoflap-recovered"),
    overwrite: OverwriteRun = False,
    resume: ResumeRun = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Recover a pruned MODEL, whoever pruned it: zeros stay, the other weights are fitted to the DENSE model's outputs.

    MODEL may be the run directory of 'ecoflap prune'. Leaves a run directory as 'ecoflap prune' does.

    Examples:
        ecoflap recover runs/first --output runs/recovered
        ecoflap recover path/to/pruned --dense path/to/llama --calibration prose.txt --test held-out.txt
    """
    if recipe.pruned is None:
        if recipe.model is None:
            raise InvalidOption("what to recover? give the pruned model: ecoflap recover MODEL --dense DENSE")
        recipe = recipe.model_copy(update={"model": dense, "pruned": model_of(recipe.model)})
    run = _run(recipe, output, overwrite, resume, quiet, as_json)
    if run is not None:
        _tell(run, quiet, as_json, {})


def _run(recipe: Recipe, output: Path, overwrite: bool, resume: bool, quiet: bool, as_json: bool) -> Path | None:
    """Carry out a recipe; return its folder, or None on workers other than the first."""
    progress = progress_to(quiet or as_json)
    first, complete = (launched() or ALONE).first, False
    if first:
        if "TORCHELASTIC_RUN_ID" in os.environ:
            from ecoflap.support.torchrun import begun

            resume, overwrite = (True, False) if begun(output) else (resume, overwrite)
        # Checked before anything heavy is imported, so that a folder in use is reported at once.
        examined = RunDirectory.examine(output, recipe.resolved(), overwrite=overwrite, resume=resume)
        complete = examined.complete
        if complete and not quiet:
            standard_error().print(f"{output} is complete: nothing to resume", markup=False, highlight=False)
    from ecoflap.run.checks import check_data, check_recipe

    check_recipe(recipe.resolved())  # before slow imports
    if not complete:
        check_data(recipe.resolved())
    from ecoflap.run.pipeline import run_recipe
    from ecoflap.support.processes import joined

    say = None if quiet or as_json or not first else say_line
    with joined() as workers:
        run = run_recipe(
            recipe, output, overwrite=overwrite, resume=resume, progress=progress, say=say, workers=workers,
            data_checked=True, begun=partial(_note_begun, output) if first else None,
        )  # fmt: skip
    return run if first else None


def _tell(run: Path, quiet: bool, as_json: bool, more: dict[str, Any]) -> None:
    """Print the result of a run; ``more`` has the results of packing and uploading."""
    from ecoflap.cli.tables import stages_table, summary_table

    if as_json:
        print_json({"run": str(run), **more, **read_json(run / METRICS, "the run's file")})
    elif not quiet:
        standard_output().print(summary_table(run))
        standard_output().print(stages_table(run))
        print_lines(f"model   {run / MODEL}\nreport  {run / REPORT}")
        if "packed" in more:
            print_lines(packed_line(more["packed"]))
        if more.get("pushed"):
            print_lines(f"pushed  {more['pushed']}")


def _note_begun(output: Path) -> None:
    if "TORCHELASTIC_RUN_ID" in os.environ:  # otherwise torch.distributed need not be imported
        from ecoflap.support.torchrun import note_begun

        note_begun(output)


def _check_hub(repo_id: str | None, private: bool) -> None:
    """Check the name and the account of an upload before the work begins."""
    if repo_id is None:
        if private:
            raise InvalidOption("--private needs --push-to-hub REPO_ID")
        return
    from ecoflap.report.hub import check_account, check_name

    check_name(repo_id)
    check_account()


def _pushed(run: Path, repo_id: str | None, private: bool, bars: bool) -> tuple[str | None, EcoflapError | None]:
    """The address of the upload, or the error; the run is complete in both cases."""
    if repo_id is None:
        return None, None
    from ecoflap.report.hub import later, push

    try:
        return push(run, repo_id, private=private, bars=bars), None
    except EcoflapError as error:
        how = later(run, repo_id, private=private)
        return None, type(error)(f"the run in {run} is complete, but was not uploaded: {error}. Later: {how}")


@app.command(cls=Command, short_help="Methods side by side at several sparsities: a table, plots and a page.")
@with_recipe_options(*GRID_FIELDS, recipe=Grid)
def compare(
    grid: Grid,
    output: Annotated[Path, output_option("The folder to write. Default: ecoflap-compare.")] = Path("ecoflap-compare"),
    overwrite: Annotated[bool, flag("--overwrite", text="Replace the comparison that is there.")] = False,
    resume: Annotated[
        bool, flag("--resume", text="Go on with what is there; methods, sparsities and seeds may be added.")
    ] = False,
    low_memory: Annotated[
        bool, flag("--low-memory", text="Keep the dense weights on disk between cells, not in memory.")
    ] = False,
    keep_models: Annotated[bool, flag("--keep-models", text="Save the model of each cell: models/CELL.")] = False,
    keep: Annotated[
        str | None,
        typer.Option("--keep", metavar="best", help="Save the best model of each sparsity, by the first test.",
                     show_default=False, rich_help_panel=OUTPUT),
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Compare methods on MODEL at several sparsities, with several seeds: compare.md, .csv, .html, .json and plots.

    A method is IMPORTANCE+CRITERION[:NAME=VALUE,...]; its NAMEs are options of prune, of the importance or of the
    criterion. What cells share is done once, finished cells are kept.

    Examples:
        ecoflap compare
        ecoflap compare --methods wanda,zeroth-order+wanda --sparsities 0.3:0.7:0.1 --seeds 0,1,2 --test-samples 300
        ecoflap compare path/to/llama --calibration prose.txt --test held-out.txt --task perplexity
        ecoflap compare --methods first-order+wanda:variant=fisher,granularity=layer,sparsegpt --output compared/first
    """
    progress = progress_to(quiet or as_json)
    # Checked before anything heavy is imported, so that a folder in use is reported at once.
    if keep not in (None, "best"):
        raise InvalidOption(f"--keep {keep}: it may be best; --keep-models saves all")
    examined = GridDirectory.examine(output, grid, overwrite=overwrite, resume=resume)
    if examined.complete and not quiet:
        standard_error().print(f"{output} is complete: nothing to resume", markup=False, highlight=False)
    from ecoflap.run.compare.plans import planned

    plans = None if examined.complete else planned(grid)  # before slow imports
    from ecoflap.run.compare.grid import run_grid
    from ecoflap.run.compare.tables import comparison_tables

    say = None if quiet or as_json else say_line
    comparison = run_grid(
        grid,
        output,
        overwrite=overwrite,
        resume=resume,
        low_memory=low_memory,
        progress=progress,
        say=say,
        plans=plans,
        keep="all" if keep_models else keep or "none",
    )
    if as_json:
        print_json({"folder": str(output), **comparison.model_dump(mode="json")})
    elif not quiet:
        for table in comparison_tables(comparison):
            standard_output().print(table)
        print_lines(f"table   {output / TABLE}\npage    {output / PAGE}")
