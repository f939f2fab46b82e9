"""The command line: thin commands over the Python interface."""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from ecoflap.cli import finetune, packed, prune, runs, stages, upop  # their import registers the commands
from ecoflap.cli.app import Ended, app
from ecoflap.cli.signals import stops
from ecoflap.cli.terminal import messages, print_lines
from ecoflap.errors import EcoflapError
from ecoflap.run.directory import RunFailed, Stopped
from ecoflap.support.full_disk import storage_error
from ecoflap.support.memory import memory_error
from ecoflap.support.workers import launched

__all__ = ["TRACEBACK", "app", "finetune", "main", "packed", "prune", "runs", "stages", "upop"]


@app.callback(invoke_without_command=True)
def _no_command(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    if version:
        from ecoflap import __version__

        print_lines(f"ecoflap {__version__}")
    elif context.invoked_subcommand is None:
        print_lines(context.get_help())


TRACEBACK = "ECOFLAP_TRACEBACK"  # environment variable: show Python's traceback for unexpected errors


def main() -> NoReturn:
    """Run the command line: exit code 0, 1 (failed), 2 (bad input), 130 or 143 (stopped)."""
    # On shared cores, threads that spin while they wait for each other slow small models down 50-fold. The variable is
    # read when torch is first imported, which happens below; a value of the user is kept.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    _silence_libraries()
    _check_surroundings()
    try:
        with stops.listening():
            try:
                _run()
            except KeyboardInterrupt as stop:  # before the command began
                _say_stopped(stop)
    except KeyboardInterrupt as stop:  # outside of the context that handles signals
        _say_stopped(stop)


def _check_surroundings() -> None:
    """Open the null device for a closed output, and fail if the current folder does not exist."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - as long as the process
    try:
        Path.cwd()
    except OSError:
        _fail("the current folder does not exist any more: change to another one", 2)


def _run() -> NoReturn:
    try:
        with messages:
            code = app(standalone_mode=False, prog_name="ecoflap")
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)  # the work is done: no message any more
        sys.stdout.flush()
    except Ended as ended:
        _say_stopped(ended.stop)
    except Exception as error:
        if stops.raised is not None:  # some libraries turn it into another error
            known = isinstance(error, RunFailed)
            _say_stopped(Stopped(Path(), str(stops.raised)) if known else stops.raised)
        _explain(error)
    sys.exit(code if isinstance(code, int) else 0)


def _say_stopped(stop: KeyboardInterrupt) -> NoReturn:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ignore another Ctrl-C during the message
    kept = "the same command with --resume goes on from here"
    message = kept if isinstance(stop, Stopped) else getattr(stop, "message", "nothing was written")
    _fail(f"stopped; {message}", 143 if str(stop) == "SIGTERM" else 130)


def _explain(error: Exception) -> NoReturn:
    """Exit with one line about ``error``; an unexpected error is raised again if the user asks for tracebacks."""
    known = memory_error(error) or error
    if isinstance(known, EcoflapError):
        if os.environ.get(TRACEBACK) and error.__cause__ is not None:  # the library's error behind the message
            sys.excepthook(type(error), error, error.__traceback__)
        _fail(str(known), known.exit_code)
    if isinstance(error, BrokenPipeError):
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # the reader has closed the pipe: discard further output
        sys.exit(1)
    if hasattr(error, "format_message"):  # typer's error for a wrong command line
        _fail(error.format_message(), 2)
    if os.environ.get(TRACEBACK):
        raise error
    if isinstance(error, RecursionError):
        _fail(f"an input is nested too deep ({error}); {TRACEBACK}=1 shows where", 2)
    if not isinstance(error, OSError) and (full := storage_error(error)) is not None:
        _fail(str(full), full.exit_code)
    if isinstance(error, OSError):
        if error.filename is None:  # no file is named: standard output, or a limit of the system
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else Python would try again at its exit
            _fail(f"{error.strerror or error}: the output can't be written, or a limit of the system is reached", 2)
        _fail(f"can't use {error.filename}: {error.strerror or error}", 2)
    if isinstance(error, RuntimeError) and str(error).startswith("Symlink loop"):  # of Path.resolve, before Python 3.13
        _fail(f"{error}: the links form a loop", 2)
    message = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    _fail(f"unexpected failure: {message} ({TRACEBACK}=1 shows where)", 1)


def _silence_libraries() -> None:
    """Hide progress bars and remarks of libraries, unless the user's settings enable them."""
    for name, value in {
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }.items():
        os.environ.setdefault(name, value)
    for noisy in ("torchao", "torch.utils._pytree"):  # transformers imports torchao if it is installed
        logging.getLogger(noisy).setLevel(logging.ERROR)


def _fail(message: str, code: int) -> NoReturn:
    line = f"ecoflap: {' '.join(message.split())}"
    if launched() is None:
        print_lines(line, error=True)
        sys.exit(code)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # the launcher ends all workers when one has ended
    from ecoflap.support.torchrun import first_to_fail

    if first_to_fail():
        print_lines(line, error=True)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # at once: the other workers see a closed connection
