"""The command line: each command is a few lines over the Python interface."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from ecoflap.comparison.folder import PAGE, TABLE, GridDirectory
from ecoflap.comparison.recipe import UNUSED, Grid
from ecoflap.errors import EcoflapError, InvalidOption
from ecoflap.helptext import Command as PlainHelp
from ecoflap.options import OUTPUT, with_recipe_options
from ecoflap.progress import Progress, Silent
from ecoflap.recipe import FILE_ONLY, OPTIONS, Recipe
from ecoflap.run import ANALYSIS, METRICS, MODEL, REPORT, RunDirectory, Stopped
from ecoflap.terminal import messages, progress_on, standard_error, standard_output


class _Ended(BaseException):
    """Carries a KeyboardInterrupt past typer, which would make a bare exit code of it."""

    def __init__(self, stop: KeyboardInterrupt) -> None:
        super().__init__()
        self.stop = stop


class Command(PlainHelp):
    """A command that can be stopped with a word."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            raise _Ended(stop) from stop


app = typer.Typer(
    name="ecoflap",
    help="Make a vision-language model sparse: importance per layer, allocation, local pruning (ECoFLaP). "
    "'ecoflap COMMAND --help' shows a command's options.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _flag(*names: str, text: str) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=OUTPUT)


Quiet = Annotated[bool, _flag("--quiet", "-q", text="Print nothing but errors.")]
Json = Annotated[bool, _flag("--json", text="Print the result as JSON, and nothing else, on standard output.")]
Overwrite = Annotated[bool, _flag("--overwrite", text="Replace the file that is there.")]
_PRIVATE = "Make the Hub's repository private. Default: public, as on the Hub."
MODEL_FIELDS = ("device", "dtype", "trust_remote_code")
PART_FIELDS = ("include", "exclude", "towers")
SOURCE_FIELDS = ("calibration", "image_folder", "columns", "prompt", "objective", "classes", "class_prompts")
DATA_FIELDS = (*SOURCE_FIELDS, "samples", "batch_size", "sequence_length", "seed")
TEST_FIELDS = ("task", "task_options", "test", "test_image_folder", "test_columns", "test_prompt", "test_samples")
SHARE_FIELDS = (
    "sparsity", "max_sparsity", "min_sparsity", "granularity", "aggregate", "budget", "tower_sparsity",
    "rule", "spread",
)  # fmt: skip
GRID_FIELDS = tuple(name for name in Grid.model_fields if name not in {"model", "seed", *UNUSED, *FILE_ONLY})
SCORE_FIELDS = ("importance", "importance_options", "importance_samples")


def _file(text: str) -> Any:
    return typer.Option("--output", "-o", metavar="FILE", help=text, show_default=False, rich_help_panel=OUTPUT)


def _progress(quiet: bool) -> Progress:
    messages.quiet = quiet
    return Silent() if quiet else progress_on(standard_error())


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def _print_json(data: Any) -> None:
    sys.stdout.write(json.dumps(data, indent=1, allow_nan=False) + "\n")


@app.command(cls=Command, short_help="The whole job: a run directory with the sparse model and report.html.")
@with_recipe_options()
def prune(
    recipe: Recipe,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="DIR", help="The run directory. Default: ecoflap-run.",
                     show_default=False, rich_help_panel=OUTPUT),
    ] = Path("ecoflap-run"),
    overwrite: Annotated[bool, _flag("--overwrite", text="Replace the run that is there (its files alone).")] = False,
    resume: Annotated[bool, _flag("--resume", text="Go on with the run that is there.")] = False,
    push_to_hub: Annotated[
        str | None,
        typer.Option("--push-to-hub", metavar="REPO_ID", help="Upload the model with its card to the Hub at the end.",
                     show_default=False, rich_help_panel=OUTPUT),
    ] = None,
    private: Annotated[bool, _flag("--private", text=_PRIVATE)] = False,
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
    progress = _progress(quiet or as_json)
    _check_hub(push_to_hub, private)
    # Looked at once before anything heavy is imported, so that a folder in use is told at once.
    examined = RunDirectory.examine(output, recipe.resolved(), overwrite=overwrite, resume=resume)
    if examined.complete and not quiet:
        standard_error().print(f"{output} is complete: nothing to resume", markup=False, highlight=False)
    from ecoflap.pipeline import run_recipe
    from ecoflap.report import summary_table

    say = None if quiet or as_json else _say
    run = run_recipe(recipe, output, overwrite=overwrite, resume=resume, progress=progress, say=say)
    pushed, failure = _pushed(run, push_to_hub, private, bars=not (quiet or as_json))
    if as_json:
        uploaded = {} if push_to_hub is None else {"pushed": pushed}
        _print_json({"run": str(run), **uploaded, **json.loads((run / METRICS).read_text("utf-8"))})
    elif not quiet:
        standard_output().print(summary_table(run))
        typer.echo(f"model   {run / MODEL}\nreport  {run / REPORT}")
        if pushed:
            typer.echo(f"pushed  {pushed}")
    if failure is not None:
        raise failure


def _check_hub(repo_id: str | None, private: bool) -> None:
    """Whatever can be known of an upload before the work for it begins."""
    if repo_id is None:
        if private:
            raise InvalidOption("--private says how to upload: give --push-to-hub REPO_ID, too")
        return
    from ecoflap.hub import check_account, check_name

    check_name(repo_id)
    check_account()


def _pushed(run: Path, repo_id: str | None, private: bool, bars: bool) -> tuple[str | None, EcoflapError | None]:
    """The address of what was uploaded, or why it was not: the run is whole either way."""
    if repo_id is None:
        return None, None
    from ecoflap.hub import later, push

    try:
        return push(run, repo_id, private=private, bars=bars), None
    except EcoflapError as error:
        how = later(run, repo_id, private=private)
        return None, type(error)(f"the run in {run} is whole, but was not uploaded: {error}. Later: {how}")


@app.command(cls=Command, short_help="Towers, blocks and layers: what is prunable, what stays dense and why.")
@with_recipe_options(*MODEL_FIELDS, *PART_FIELDS, *SOURCE_FIELDS, "sequence_length")
def inspect(recipe: Recipe, as_json: Json = False) -> None:
    """Show towers, blocks and layers of MODEL: what is prunable, and what stays dense and why.

    With calibration data one forward is watched, which gives the true order and finds what never runs.

    Examples:
        ecoflap inspect
        ecoflap inspect path/to/blip2 --calibration vqa.jsonl
        ecoflap inspect path/to/llama --json
    """
    from ecoflap.commands import inspect_model
    from ecoflap.listings import anatomy_json, anatomy_tables

    anatomy, note = inspect_model(recipe)
    if as_json:
        _print_json(anatomy_json(anatomy))
        return
    for table in anatomy_tables(anatomy, note):
        standard_output().print(table)


@app.command(cls=Command, short_help="Stage 1 alone: a score for each layer.")
@with_recipe_options(*MODEL_FIELDS, *PART_FIELDS, *DATA_FIELDS, *SCORE_FIELDS)
def importance(
    recipe: Recipe,
    output: Annotated[Path, _file("File to write. Default: importance.json.")] = Path("importance.json"),
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Stage 1 alone: measure a score for each layer of MODEL.

    Examples:
        ecoflap importance --output importance.json
        ecoflap importance path/to/llama --calibration prose.txt --sequence-length 512 --importance-samples 64
        ecoflap importance path/to/llama --calibration prose.txt --importance first-order
    """
    from ecoflap.commands import measure_model, refuse_existing
    from ecoflap.files import write_json

    refuse_existing(output, overwrite)
    scores = measure_model(recipe, _progress(quiet or as_json)).to_json()
    write_json(output, scores)
    if as_json:
        _print_json(scores)
    elif not quiet:
        typer.echo(f"scores  {output}")


@app.command(cls=Command, short_help="Scores to sparsities: instantaneous, needs neither model nor data.")
@with_recipe_options(*SHARE_FIELDS, model=False)
def allocate(
    recipe: Recipe,
    scores: Annotated[Path, typer.Argument(metavar="IMPORTANCE", help="An importance.json, or the run that holds it.")],
    output: Annotated[
        Path | None, _file("File to write. Default: allocation.json beside the scores; for a run, in this folder.")
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
    from ecoflap.commands import allocate_file

    messages.quiet = quiet
    allocation, target = allocate_file(scores, recipe, output, overwrite)
    if as_json:
        _print_json(allocation.to_json())
    elif not quiet:
        from ecoflap.listings import allocation_table

        standard_output().print(allocation_table(allocation))
        typer.echo(f"allocation  {target}")


@app.command(cls=Command, short_help="Methods side by side at several sparsities: a table, plots and a page.")
@with_recipe_options(*GRID_FIELDS, recipe=Grid)
def compare(
    grid: Grid,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="DIR", help="The folder to write. Default: ecoflap-compare.",
                     show_default=False, rich_help_panel=OUTPUT),
    ] = Path("ecoflap-compare"),
    overwrite: Annotated[bool, _flag("--overwrite", text="Replace the comparison that is there.")] = False,
    resume: Annotated[
        bool, _flag("--resume", text="Go on with what is there; methods, sparsities and seeds may be added.")
    ] = False,
    low_memory: Annotated[
        bool, _flag("--low-memory", text="Keep the dense weights on disk between cells, not in memory.")
    ] = False,
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
    progress = _progress(quiet or as_json)
    # Looked at once before anything heavy is imported, so that a folder in use is told at once.
    examined = GridDirectory.examine(output, grid, overwrite=overwrite, resume=resume)
    if examined.complete and not quiet:
        standard_error().print(f"{output} is complete: nothing to resume", markup=False, highlight=False)
    from ecoflap.comparison.grid import run_grid
    from ecoflap.comparison.listing import comparison_tables

    say = None if quiet or as_json else _say
    comparison = run_grid(
        grid, output, overwrite=overwrite, resume=resume, low_memory=low_memory, progress=progress, say=say
    )
    if as_json:
        _print_json({"folder": str(output), **comparison.model_dump(mode="json")})
    elif not quiet:
        for table in comparison_tables(comparison):
            standard_output().print(table)
        typer.echo(f"table   {output / TABLE}\npage    {output / PAGE}")


@app.command(cls=Command, short_help="VQA accuracy, CIDEr, recall, perplexity, ..., suites of lm-eval.")
@with_recipe_options(
    *MODEL_FIELDS, *TEST_FIELDS, "classes", "class_prompts", "batch_size", "sequence_length", "seed",
    aliases={"test_samples": "--limit"},
)  # fmt: skip
def evaluate(
    recipe: Recipe,
    output: Annotated[Path | None, _file("Also write the results to this file.")] = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Measure MODEL on tasks, or on all evaluations of a recipe.

    Examples:
        ecoflap evaluate
        ecoflap evaluate runs/first/model --limit 200 --json
        ecoflap evaluate path/to/llama --task perplexity --test held-out.txt --sequence-length 2048
        ecoflap evaluate path/to/llama --task multiple-choice --test mmlu.jsonl --task-option shots=5
        ecoflap evaluate path/to/llama --task lm_eval:hellaswag --batch-size 16
        ecoflap evaluate runs/blip2/model --recipe recipes/blip2/blip2-flan-t5-xl.yaml --output metrics.json
    """
    from ecoflap.commands import evaluate_model, refuse_existing

    if output is not None:
        refuse_existing(output, overwrite)
    results = evaluate_model(recipe, _progress(quiet or as_json))
    if output is not None:
        from ecoflap.files import write_json

        write_json(output, {"format": 1, "model": recipe.model, "results": results})
    if as_json:
        _print_json(results)
    elif not quiet:
        from ecoflap.listings import quality_table

        standard_output().print(quality_table(results))


@app.command(cls=Command, short_help="Pictures that explain a run: distributions, agreement, loss landscape, ...")
def analyse(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory that is complete.", show_default=False)],
    what: Annotated[
        list[str] | None,
        typer.Option("--what", metavar="NAME", show_default=False, rich_help_panel=OUTPUT,
                     help="importance, allocation, before-after, distributions, agreement, effects or landscape. "
                     "May be repeated. Default: all."),
    ] = None,
    samples: Annotated[
        str | None,
        typer.Option("--samples", metavar="N", show_default=False, rich_help_panel=OUTPUT,
                     help="Calibration samples to measure on. Default: those of stage 1, fewer for large models."),
    ] = None,
    overwrite: Annotated[bool, _flag("--overwrite", text="Measure again what is there already.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Analyse RUN: JSON and pictures in its folder 'analysis', and report.html again, which shows them.

    Model, data and options are those of the run. What an earlier call has measured is kept.

    Examples:
        ecoflap analyse runs/first
        ecoflap analyse runs/first --what importance --what allocation
        ecoflap analyse runs/first --what landscape --samples 8 --overwrite
    """
    from ecoflap.analysis import analyse as analyse_run
    from ecoflap.commands import find_own_modules

    # Read as the recipe reads numbers, so that a fault has one wording wherever it is found.
    count = None if samples is None else Recipe.parse({"samples": samples}, OPTIONS).samples
    find_own_modules(run)
    outcomes = analyse_run(run, what, samples=count, overwrite=overwrite, progress=_progress(quiet or as_json))
    if as_json:
        _print_json({"run": str(run), "analyses": {name: found.to_json() for name, found in outcomes.items()}})
    elif not quiet:
        for name, found in outcomes.items():
            told = f"{found.state}: {found.note}" if found.note else found.state
            typer.echo(f"{name:<14}{told}")
        typer.echo(f"pictures  {run / ANALYSIS}\nreport    {run / REPORT}")


@app.command(cls=Command, short_help="Write the page of a run or comparison again, from its files.")
def report(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="A run directory, or what compare wrote.", show_default=False)
    ],
    quiet: Quiet = False,
) -> None:
    """Write report.html of a run, or compare.html of a comparison, again from the files of FOLDER.

    Examples:
        ecoflap report runs/first
        ecoflap report comparisons/first
    """
    from ecoflap.report import rebuild

    path = rebuild(folder)
    if not quiet:
        typer.echo(f"report  {path}")


@app.command("push", cls=Command, short_help="Upload a run's model with its card to the Hub.")
def push_run(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run directory, or a folder with a model.", show_default=False)
    ],
    repo_id: Annotated[
        str, typer.Argument(metavar="REPO_ID", help="owner/name, or name for your own account.", show_default=False)
    ],
    private: Annotated[bool, _flag("--private", text=_PRIVATE)] = False,
    revision: Annotated[
        str | None,
        typer.Option("--revision", metavar="BRANCH", help="Branch to upload to, made where there is none.",
                     show_default=False, rich_help_panel=OUTPUT),
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Upload the model of RUN with its card to the Hugging Face Hub, in one commit.

    The token is the one of 'hf auth login', or HF_TOKEN.

    Examples:
        ecoflap push runs/first me/llama-sparse
        ecoflap push runs/first llama-sparse --private --revision p60
    """
    from ecoflap.hub import push

    messages.quiet = quiet
    address = push(run, repo_id, private=private, revision=revision, bars=not (quiet or as_json))
    if as_json:
        _print_json({"pushed": address})
    elif not quiet:
        typer.echo(f"pushed  {address}")


@app.callback(invoke_without_command=True)
def _no_command(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    if version:
        from ecoflap import __version__

        typer.echo(f"ecoflap {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


TRACEBACK = "ECOFLAP_TRACEBACK"  # environment variable: let what nobody foresaw end in Python's own traceback


def main() -> NoReturn:
    """Run the command line: exit code 0, 1 (failed), 2 (bad input), 130 or 143 (stopped)."""
    # On cores that are shared, threads that spin while they wait for each other slow small models down 50-fold. Read
    # when torch is first imported, which happens below; a value of the user's own stands.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    _quieten()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGTERM, _terminate)
    try:
        with messages:
            code = app(standalone_mode=False, prog_name="ecoflap")
        sys.stdout.flush()
    except EcoflapError as error:
        _fail(str(error), error.exit_code)
    except _Ended as ended:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # pressed again while we say good-bye
        kept = "the same command with --resume goes on from here"
        told = kept if isinstance(ended.stop, Stopped) else getattr(ended.stop, "told", "nothing was written")
        _fail(f"stopped; {told}", 143 if str(ended.stop) == "SIGTERM" else 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has left: nothing more to say
        sys.exit(1)
    except Exception as error:
        if hasattr(error, "format_message"):  # what typer raises for a wrong command line
            _fail(error.format_message(), 2)
        if os.environ.get(TRACEBACK):
            raise
        told = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        _fail(f"unexpected failure: {told} ({TRACEBACK}=1 shows where)", 1)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    sys.exit(code if isinstance(code, int) else 0)


def _terminate(*_: object) -> None:
    raise KeyboardInterrupt("SIGTERM")


def _quieten() -> None:
    """Bars and remarks of the libraries below us, unless the user's own settings want them."""
    for name, value in {
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }.items():
        os.environ.setdefault(name, value)


def _fail(message: str, code: int) -> NoReturn:
    sys.stderr.write(f"ecoflap: {' '.join(message.split())}\n")
    sys.exit(code)
