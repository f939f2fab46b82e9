"""Measure in a process of its own, whose peak memory is its alone: the script calls itself, and prints JSON last."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any


class Failed(Exception):
    """The process ended badly; the last line of its complaint."""


def run_apart(command: list[str], environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Call a script with this Python; the object on the last line that it prints.

    Args:
        command: the script and its arguments.
        environment: in the place of this process' own.

    Raises:
        Failed: it did not end with exit status 0.
    """
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise Failed((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found
