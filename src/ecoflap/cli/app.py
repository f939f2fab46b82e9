"""Defines the command line's application and shared parts of commands: options, progress, output, ``--help``."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from collections.abc import Iterator
from itertools import zip_longest
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from ecoflap.cli.options import OUTPUT
from ecoflap.cli.signals import stops
from ecoflap.cli.terminal import messages, print_lines, progress_on, standard_error
from ecoflap.errors import InvalidOption
from ecoflap.run.compare.recipe import UNUSED, Grid
from ecoflap.run.extensions import installed
from ecoflap.run.recipe import FILE_ONLY
from ecoflap.support.progress import Progress, Silent
from ecoflap.support.workers import ALONE, launched

NAMES = 30  # columns for an option's name; a longer one has its help on the next line
_LAST = "Run and output"


class PlainHelp(TyperCommand):
    """A command whose help groups the options under headings, with examples at the end."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        width = max(60, min(shutil.get_terminal_size().columns, 110)) - 1
        blocks = [f"Usage: {ctx.command_path} {' '.join(self._usage(ctx))}"]
        text, _, examples = (self.help or "").partition("Examples:")
        blocks += [textwrap.fill(" ".join(paragraph.split()), width) for paragraph in text.strip().split("\n\n")]
        panels: dict[str, list[str]] = {}
        for parameter in self.get_params(ctx):
            row = _row(parameter, ctx)
            if row is not None:
                panels.setdefault(_panel(parameter), []).append(_entry(*row, width))
        headings = sorted(panels, key=lambda heading: heading == _LAST)  # a stable sort: others keep their order
        blocks += ["\n".join([f"{heading}:", *panels[heading]]) for heading in headings]
        if examples:
            blocks.append("Examples:\n" + textwrap.indent(textwrap.dedent(examples).strip(), "  "))
        formatter.write("\n\n".join(blocks) + "\n")

    def _usage(self, ctx: Any) -> list[str]:
        arguments = [_name(p) for p in self.get_params(ctx) if p.param_type_name == "argument"]
        return [*arguments, "[OPTIONS]"]


def _name(parameter: Any) -> str:
    return str(parameter.metavar or parameter.name.upper())


def _panel(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return "Arguments"
    return str(getattr(parameter, "rich_help_panel", None) or _LAST)


def _row(parameter: Any, ctx: Any) -> tuple[str, str] | None:
    if getattr(parameter, "hidden", False):
        return None
    if parameter.param_type_name == "argument":
        return _name(parameter), parameter.help or ""
    short = [name for name in parameter.opts if not name.startswith("--")]
    names = ", ".join([*short, *(name for name in parameter.opts if name.startswith("--"))])
    if not parameter.is_flag:
        names += f" {_name(parameter)}"
    added = installed(parameter.name)
    return names, (parameter.help or "") + (f" Of other packages: {', '.join(added)}." if added else "")


def _entry(names: str, text: str, width: int) -> str:
    indent = " " * (NAMES + 2)
    lines = textwrap.wrap(" ".join(text.split()), width - len(indent), break_on_hyphens=False) or [""]
    if len(names) + 2 > NAMES:
        return "\n".join([f"  {names}", *(indent + line for line in lines)]).rstrip()
    return "\n".join([f"  {names:<{NAMES}}{lines[0]}", *(indent + line for line in lines[1:])]).rstrip()


SHARED = ("prune", "recover", "importance", "evaluate")  # commands that several workers can share


class Ended(BaseException):
    """Carries a KeyboardInterrupt through typer, which would replace it by an exit code."""

    def __init__(self, stop: KeyboardInterrupt) -> None:
        super().__init__()
        self.stop = stop


class Command(PlainHelp):
    """A command that handles signals with a message, and whose ``--offload-activations`` needs no value."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, list(_with_value(args)))

    def invoke(self, ctx: Any) -> Any:
        if launched() is not None and ctx.info_name not in SHARED:
            raise InvalidOption(f"{ctx.info_name} runs in one process: start it without torchrun or accelerate launch")
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            raise Ended(stop) from stop


def _with_value(args: list[str]) -> Iterator[str]:
    """``--offload-activations`` without a value is "cpu", ``--no-offload-activations`` "none", as in older versions."""
    for word, following in zip_longest(args, args[1:], fillvalue=""):
        yield "--offload-activations" if word == "--no-offload-activations" else word
        if word == "--no-offload-activations":
            yield "none"
        elif word == "--offload-activations" and (not following or following.startswith("-")):
            yield "cpu"


app = typer.Typer(
    name="ecoflap",
    help="Make a vision-language model sparse: importance per layer, allocation, local pruning (ECoFLaP). "
    "'ecoflap COMMAND --help' shows a command's options.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def flag(*names: str, text: str) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=OUTPUT)


Quiet = Annotated[bool, flag("--quiet", "-q", text="Print nothing but errors.")]
Json = Annotated[bool, flag("--json", text="Print the result as JSON, and nothing else, on standard output.")]
Overwrite = Annotated[bool, flag("--overwrite", text="Replace the file that is there.")]
OverwriteRun = Annotated[bool, flag("--overwrite", text="Replace the run that is there (its files alone).")]
ResumeRun = Annotated[bool, flag("--resume", text="Go on with the run that is there.")]
PRIVATE = "Make the Hub's repository private. Default: public, as on the Hub."
MODEL_FIELDS = ("device", "device_map", "max_memory", "dtype", "compute_dtype", "trust_remote_code")
PART_FIELDS = ("include", "exclude", "towers")
SOURCE_FIELDS = ("calibration", "image_folder", "columns", "prompt", "objective", "classes", "class_prompts")
DATA_FIELDS = (*SOURCE_FIELDS, "samples", "batch_size", "sequence_length", "window_start", "seed")
TEST_FIELDS = ("task", "task_options", "test", "test_image_folder", "test_columns", "test_prompt", "test_samples")

SHARE_FIELDS = (
    "sparsity", "max_sparsity", "min_sparsity", "granularity", "aggregate", "budget", "tower_sparsity",
    "rule", "spread",
)  # fmt: skip

GRID_FIELDS = tuple(name for name in Grid.model_fields if name not in {"model", "seed", *UNUSED, *FILE_ONLY})
SCORE_FIELDS = ("importance", "importance_options", "importance_samples", "importance_error")


def output_option(text: str, metavar: str = "DIR") -> Any:
    return typer.Option("--output", "-o", metavar=metavar, help=text, show_default=False, rich_help_panel=OUTPUT)


def progress_to(quiet: bool) -> Progress:
    """Progress on the terminal; only the first of several workers shows it."""
    messages.quiet = stops.quiet = quiet = quiet or not (launched() or ALONE).first
    return stops.progress(Silent() if quiet else progress_on(standard_error()))


def say_line(line: str) -> None:
    print_lines(line, error=True)


def print_json(data: Any) -> None:
    sys.stdout.write(json.dumps(data, indent=1, allow_nan=False) + "\n")
