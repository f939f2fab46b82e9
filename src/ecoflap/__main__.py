"""``ecoflap`` and ``python -m ecoflap``: the command line."""

from __future__ import annotations

import os
import signal
from types import FrameType


def _leave(number: int, frame: FrameType | None) -> None:
    os.write(2, b"ecoflap: stopped; nothing was written\n")
    os._exit(128 + number)


def start() -> None:
    """Run the command line, whose modules take a while to be read: a signal in that time is heard, too."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _leave)
    from ecoflap.cli import main

    main()


if __name__ == "__main__":
    start()
