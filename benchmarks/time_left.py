"""How far off the time left is: `ecoflap prune` on the embedded model, each step's time left against what came.

    python benchmarks/time_left.py --sparsity 0.5 -o runs/time-left

Options are those of `ecoflap prune`. Both clocks are read: by the wall's, other programs on the machine count; by the
processor's they don't, but threads that wait do, so set OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module

from rich.console import Console

from ecoflap.cli import main
from ecoflap.cli.pace import Pace

CLOCKS = {"wall": time.monotonic, "processor": time.process_time}


class _Task:
    def __init__(self, total: int, done: int) -> None:
        self.paces = {name: Pace(total, done, clock) for name, clock in CLOCKS.items()}
        self.told: dict[str, list[tuple[int, float, float | None]]] = {name: [] for name in CLOCKS}

    def plan(self, kinds: Sequence[str]) -> None:
        for pace in self.paces.values():
            pace.plan(kinds)

    def advance(self, steps: int = 1, detail: str = "") -> None:
        for name, pace in self.paces.items():
            pace.advance(steps, detail)
            self.told[name].append((pace.done, pace.elapsed, pace.left()))


class Compared:
    """Prints each stage's ratio of the time left as told to the time that it took."""

    @contextmanager
    def stage(self, name: str, total: int, done: int = 0) -> Iterator[_Task]:
        task = _Task(total, done)
        yield task
        for clock, pace in task.paces.items():
            end = pace.elapsed
            ratios = [
                left / (end - elapsed)
                for count, elapsed, left in task.told[clock]
                if left is not None and count - done >= 0.1 * (total - done) and elapsed <= 0.9 * end
            ]
            if ratios:
                print(
                    f"{name}: {total} steps, {end:.1f} s by the {clock} clock; time left as told / as it was: after "
                    f"10 % of the steps {ratios[0]:.2f}, then until 90 % of the time "
                    f"{min(ratios):.2f} to {max(ratios):.2f}"
                )


def _compared(console: Console) -> Compared:
    return Compared()


if __name__ == "__main__":
    import_module("ecoflap.cli.app").progress_on = _compared  # type: ignore[attr-defined]
    sys.argv[1:] = ["prune", *sys.argv[1:]]
    main()
