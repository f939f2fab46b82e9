"""``--help`` as plain text: options under headings, names never cut off, whatever the terminal's width."""

from __future__ import annotations

import shutil
import textwrap
from typing import Any

from typer.core import TyperCommand

NAMES = 30  # columns for an option's name; a longer one has its help on the next line
_LAST = "Run and output"


class Command(TyperCommand):
    """A command whose options stand under their headings, with examples at the end."""

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
        headings = sorted(panels, key=lambda heading: heading == _LAST)  # stable: all others as they come
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
    return names, parameter.help or ""


def _entry(names: str, text: str, width: int) -> str:
    indent = " " * (NAMES + 2)
    lines = textwrap.wrap(" ".join(text.split()), width - len(indent), break_on_hyphens=False) or [""]
    if len(names) + 2 > NAMES:
        return "\n".join([f"  {names}", *(indent + line for line in lines)]).rstrip()
    return "\n".join([f"  {names:<{NAMES}}{lines[0]}", *(indent + line for line in lines[1:])]).rstrip()
