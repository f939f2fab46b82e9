"""``ecoflap`` and ``python -m ecoflap``: the command line."""

from __future__ import annotations

# Not signal and typing: they import a dozen modules, during which Ctrl-C would show a traceback.
import _signal as signal  # type: ignore[import-not-found]
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType


def _leave(number: int, frame: FrameType | None) -> None:
    os.write(2, b"ecoflap: stopped; nothing was written\n")
    os._exit(128 + number)


def start() -> None:
    """Run the command line, with handlers for signals already during its imports."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _leave)
    from ecoflap.cli import main

    try:
        main()
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)  # all output is written, and Python's exit takes a while


if __name__ == "__main__":
    start()
