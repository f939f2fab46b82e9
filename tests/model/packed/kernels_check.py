"""Builds and runs kernels_check.cpp: under the sanitisers here, and as 64-bit Arm where a cross compiler is at hand.

python tests/model/packed/kernels_check.py
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
SANITISERS = ("-g1", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def check(command: list[str], machine: str, runner: list[str], flags: tuple[str, ...]) -> str:
    """What went wrong, or ""."""
    sys.path.insert(0, str(ROOT))
    from hatch_build import FOLDER, compiled

    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "check"
        own = str(Path(__file__).with_name("kernels_check"))
        failed = compiled(command, ROOT / FOLDER / "csrc", target, machine, (own,), flags=flags, link=["-lpthread"])
        if failed:
            return failed
        done = subprocess.run([*runner, str(target)], capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"})
        print(done.stdout, end="")
        return "" if done.returncode == 0 else (done.stderr or done.stdout)[-4000:]


def main() -> int:
    failed = check(["g++"], platform.machine(), [], SANITISERS)
    cross, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if not failed and cross:
        # Without an emulator it is at least compiled.
        runner = [emulator, "-L", "/usr/aarch64-linux-gnu"] if emulator else ["true"]
        failed = check([cross], "aarch64", runner, ("-static",) if emulator else ())
    print(failed or "kernels: well")
    return bool(failed)


if __name__ == "__main__":
    raise SystemExit(main())
