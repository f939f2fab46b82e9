"""All figures of docs/performance.md in one go: every script that measures time or memory, one after the other.

    make bench            # or: python benchmarks/performance.py [--only NAME ...] [--output performance.md]

Takes less than half an hour on two cores. Ratios count; each is of ways that were measured side by side in one run.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from assets import AssetUnavailable, fetch

HERE = Path(__file__).parent


def _smollm2(script: str, *options: str) -> Callable[[], list[str]]:
    """A script on SmolLM2-135M and the prose; fetched when it is its turn."""

    def command() -> list[str]:
        model, prose = fetch("smollm2") / "safetensors", fetch("prose") / "prose-train.txt"
        return [script, str(model), "--calibration", str(prose), *options]

    return command


PARTS: dict[str, Callable[[], list[str]]] = {
    "replay, the embedded VLM": lambda: ["replay.py", "--layers", "0"],
    "replay, SmolLM2": _smollm2("replay.py", "--sequence-length", "128", "--layers", "8", "--batches", "1"),
    "gradient norms, SmolLM2": _smollm2(
        "gradients.py", "--sequence-length", "128", "--layers", "4", "--batches", "1"
    ),
    "half precision in stage 1, SmolLM2": _smollm2(
        "gradients.py", "--sequence-length", "128", "--layers", "4", "--batches", "1", "--dtype", "bfloat16"
    ),
    "forward mode, the embedded VLM": lambda: ["forward_mode.py", "--layers", "0"],
    "replay, the shape of BLIP-2": lambda: ["blip2_shape.py", "--threads", "1"],
    "memory of stage 2": lambda: ["stage2_memory.py"],
    "stage 2, SmolLM2": _smollm2("stage2.py", "--sequence-length", "512", "--repeats", "1"),
    "larger than the memory, a small shape": lambda: [
        "larger_than_memory.py", "--shape", "llama-1b", "--layers", "4", "--shard", "0.2", "--allowance", "2",
        "--samples", "2", "--length", "8",
    ],
    "GPU": lambda: ["gpu.py"],
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=list(PARTS), help="default: all")
    parser.add_argument("--output", type=Path, help="a file for the tables, too")
    options = parser.parse_args()
    pages: list[str] = []
    begin, failed = time.monotonic(), 0
    for name in options.only or PARTS:
        page, fine = one(name)
        failed += not fine
        pages.append(page)
        print(page, flush=True)
        if options.output:
            options.output.write_text("\n".join(pages), encoding="utf-8")
    print(f"{len(pages) - failed} of {len(pages)} parts in {(time.monotonic() - begin) / 60:.0f} min")
    sys.exit(bool(failed))


def one(name: str) -> tuple[str, bool]:
    """A part's heading, its command, what it printed, and how long it took; False if it failed."""
    try:
        script, *rest = PARTS[name]()
    except AssetUnavailable as why:
        return f"## {name}\n\nleft out: {why}\n", False
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(HERE / script), *rest],
        capture_output=True,
        text=True,
        check=False,
    )
    body = done.stdout.strip()
    if done.returncode:
        body += "\n\nfailed: " + (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    command = " ".join(["python", f"benchmarks/{script}", *rest])
    return f"## {name}\n\n```sh\n{command}\n```\n\n{body}\n\n{time.monotonic() - begin:.0f} s\n", not done.returncode


if __name__ == "__main__":
    main()
