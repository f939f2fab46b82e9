"""How far off the time left is: `ecoflap prune` on the embedded model, each step's time left against what came.

    python benchmarks/time_left.py --sparsity 0.5 -o runs/time-left

Options are those of `ecoflap prune`. Times are the processor's, so that other programs on the machine do not count; set
OMP_NUM_THREADS=1, since threads that wait would be counted as well.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

from rich.console import Console

from ecoflap.cli import main
from ecoflap.cli.terminal import Pace


class _Task:
    def __init__(self, pace: Pace) -> None:
        self.pace, self.told = pace, list[tuple[int, float, float | None]]()

    def advance(self, steps: int = 1, detail: str = "") -> None:
        self.pace.advance(steps, detail)
        self.told.append((self.pace.done, self.pace.elapsed, self.pace.left()))


class Compared:
    """Prints each stage's ratio of the time left as told to the time that it took."""

    @contextmanager
    def stage(self, name: str, total: int, done: int = 0) -> Iterator[_Task]:
        task = _Task(Pace(total, done, time.process_time))
        yield task
        end = task.pace.elapsed
        ratios = [
            left / (end - elapsed)
            for count, elapsed, left in task.told
            if left is not None and count - done >= 0.1 * (total - done) and elapsed <= 0.9 * end
        ]
        if ratios:
            print(
                f"{name}: {total} steps, {end:.1f} s; time left as told / as it was: after 10 % of the steps "
                f"{ratios[0]:.2f}, then until 90 % of the time {min(ratios):.2f} to {max(ratios):.2f}"
            )


def _compared(console: Console) -> Compared:
    return Compared()


if __name__ == "__main__":
    import_module("ecoflap.cli.app").progress_on = _compared  # type: ignore[attr-defined]
    sys.argv[1:] = ["prune", *sys.argv[1:]]
    main()
