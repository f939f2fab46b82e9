"""Commands on a finished run: analyse, report, push."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ecoflap.cli.app import PRIVATE, Command, Json, Quiet, app, flag, print_json, progress_to
from ecoflap.cli.options import OUTPUT
from ecoflap.cli.terminal import messages, print_lines
from ecoflap.run.names import ANALYSIS, REPORT
from ecoflap.run.recipe import OPTIONS, Recipe


@app.command(cls=Command, short_help="Plots that explain a run: distributions, agreement, loss landscape, ...")
def analyse(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A complete run directory.", show_default=False)],
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
    overwrite: Annotated[bool, flag("--overwrite", text="Repeat earlier measurements.")] = False,
    trust_remote_code: Annotated[
        bool, flag("--trust-remote-code", text="Run code of the checkpoint, if the run did.")
    ] = False,
    objective: Annotated[
        str | None,
        typer.Option("--objective", metavar="MODULE:FUNCTION", show_default=False, rich_help_panel=OUTPUT,
                     help="The run's own objective, which must be given again, since it runs code."),
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Analyse RUN: JSON and plots in its folder 'analysis', and report.html again, which shows them.

    Model, data and options are those of the run. Earlier measurements are kept.

    Examples:
        ecoflap analyse runs/first
        ecoflap analyse runs/first --what importance --what allocation
        ecoflap analyse runs/first --what landscape --samples 8 --overwrite
    """
    from ecoflap.report.analysis.run import analyse as analyse_run
    from ecoflap.run.commands import find_own_modules

    # Parsed as in recipes, so that a fault has the same message everywhere.
    count = None if samples is None else Recipe.parse({"samples": samples}, OPTIONS).samples
    find_own_modules(objective)
    outcomes = analyse_run(
        run, what, samples=count, overwrite=overwrite, progress=progress_to(quiet or as_json),
        trust_remote_code=trust_remote_code, objective=objective,
    )  # fmt: skip
    if as_json:
        print_json({"run": str(run), "analyses": {name: found.to_json() for name, found in outcomes.items()}})
    elif not quiet:
        for name, found in outcomes.items():
            text = f"{found.state}: {found.note}" if found.note else found.state
            print_lines(f"{name:<14}{text}")
        print_lines(f"pictures  {run / ANALYSIS}\nreport    {run / REPORT}")


@app.command(cls=Command, short_help="Write the page of a run or comparison again, from its files.")
def report(
    folder: Annotated[
        Path,
        typer.Argument(metavar="FOLDER", help="A run directory, or the folder of a comparison.", show_default=False),
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
        print_lines(f"report  {path}")


@app.command("push", cls=Command, short_help="Upload a run's model with its card to the Hub.")
def push_run(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run directory, or a folder with a model.", show_default=False)
    ],
    repo_id: Annotated[
        str, typer.Argument(metavar="REPO_ID", help="owner/name, or name for your own account.", show_default=False)
    ],
    private: Annotated[bool, flag("--private", text=PRIVATE)] = False,
    revision: Annotated[
        str | None,
        typer.Option("--revision", metavar="BRANCH", help="Branch to upload to; created if it does not exist.",
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
    from ecoflap.report.hub import push

    messages.quiet = quiet
    address = push(run, repo_id, private=private, revision=revision, bars=not (quiet or as_json))
    if as_json:
        print_json({"pushed": address})
    elif not quiet:
        print_lines(f"pushed  {address}")
