"""Names and texts of strangers on the terminal and in the log: nothing of them is obeyed."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table

from ecoflap.cli.terminal import Bars, Lines, messages, print_lines, standard_output
from ecoflap.run.log import logging_to
from ecoflap.support.text import printable

EVIL = "layer\x1b[2J\x1b]0;owned\x07\x9b31m\r\x08\u202egnp\ud800"
UNSAFE = set(EVIL) - set(printable("layer[2J]0;owned31mgnp\\x"))


def clean(text: str) -> bool:
    return not UNSAFE & set(text) and "\\x1b[2J" in text


@given(st.text())
def test_printable_text_has_nothing_that_a_terminal_obeys(text: str) -> None:
    shown = printable(text)
    shown.encode("utf-8")
    assert all(c in "\t\n" or not (ord(c) < 32 or 127 <= ord(c) < 160) for c in shown)
    assert printable(shown) == shown
    if text.isascii() and text.isprintable():
        assert shown == text


def test_lines_tables_warnings_bars_and_the_log_are_clean(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    print_lines(EVIL)
    assert clean(capsys.readouterr().out)
    print_lines(EVIL, error=True)
    assert clean(capsys.readouterr().err)
    table = Table(EVIL)
    table.add_row(EVIL)
    standard_output().print(table)
    standard_output().print(EVIL, markup=False)
    assert clean(capsys.readouterr().out)
    log = logging.getLogger("ecoflap")
    monkeypatch.setattr(log, "propagate", False)  # pytest sends what it captures between processes, as UTF-8
    with messages, logging_to(tmp_path / "log.txt"):
        log.warning("%s", EVIL)
    assert clean(capsys.readouterr().err)
    assert clean((tmp_path / "log.txt").read_text("utf-8"))


@pytest.mark.parametrize("kind", [Bars, Lines])
def test_progress_is_clean(kind: type[Bars] | type[Lines]) -> None:
    from ecoflap.cli.terminal import _CleanConsole

    written = io.StringIO()
    console = _CleanConsole(file=written, force_terminal=kind is Bars, width=200)
    with kind(console).stage(EVIL, total=2) as task:
        task.advance(1, EVIL)
    assert clean(written.getvalue().replace("\x1b[", "").replace("\r", "") if kind is Bars else written.getvalue())
