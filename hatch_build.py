"""Compiles the kernels for packed weights into the wheel, with the system's own C++ compiler if there is one."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = Path("src/ecoflap/model/packed/kernels")
LIBRARY = "lib/ecoflap_kernels.so"
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-maybe-uninitialized")
_AVX2 = ("-mavx2", "-mfma", "-mf16c", "-mpopcnt")
_AVX512 = tuple(f"-mavx512{name}" for name in ("f", "bw", "dq", "vl", "vbmi2"))
VARIANTS: dict[str, dict[str, tuple[str, ...]]] = {  # of a machine: file to what its instruction set needs
    "x86_64": {"avx2": _AVX2, "avx512": (*_AVX2, *_AVX512)},
    "aarch64": {"neon": ()},
    "arm64": {"neon": ()},
}


class KernelHook(BuildHookInterface):  # type: ignore[type-arg]
    """A wheel for this platform with the kernels; a pure one, and a line that says so, where they can't be built."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel":
            return
        editable = version == "editable"
        target = Path(self.root) / FOLDER / LIBRARY if editable else Path(tempfile.mkdtemp()) / LIBRARY
        if reason := build(Path(self.root) / FOLDER / "csrc", target):
            self.app.display_warning(f"ecoflap: built without kernels ({reason}): packed models run by torch alone")
            return
        if not editable:
            build_data["force_include"][str(target)] = str(FOLDER.relative_to("src") / LIBRARY)
        build_data["pure_python"] = False
        build_data["tag"] = "py3-none-" + sysconfig.get_platform().replace("-", "_").replace(".", "_")


def build(source: Path, target: Path, *, compiler: str | None = None) -> str:
    """Compile ``source``/*.cpp into the shared library ``target``; "" or the reason why there is none."""
    if os.environ.get("ECOFLAP_NO_KERNELS"):
        return "ECOFLAP_NO_KERNELS is set"
    if os.name == "nt":
        return "Windows is not supported"
    compiler = (
        compiler or os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    )
    if compiler is None:
        return "no C++ compiler was found"
    link = ["-shared", *(["-ldl"] if sys.platform == "linux" else [])]
    return compiled(compiler.split(), source, target, platform.machine(), ("torch_op",), link=link)


def compiled(
    command: list[str],
    source: Path,
    target: Path,
    machine: str,
    more: tuple[str, ...],
    *,
    flags: tuple[str, ...] = (),
    link: list[str],
) -> str:
    """Compile the kernels for ``machine`` with the files ``more`` into ``target``; "" or what the compiler said."""
    variants = VARIANTS.get(machine, {})
    defines = [f"-DECOFLAP_{name.upper()}" for name in variants]
    files = {"scalar": (), "dispatch": (), **dict.fromkeys(more, ()), **variants}
    with tempfile.TemporaryDirectory() as folder:
        objects, jobs = [], []
        for name, own in files.items():
            objects.append(str(Path(folder) / f"{Path(name).stem}.o"))
            words = [*command, *FLAGS, *flags, *own, *defines, f"-I{source}", "-c", str(source / f"{name}.cpp")]
            jobs.append(
                subprocess.Popen(
                    [*words, "-o", objects[-1]], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
                )
            )
        told = [job.communicate()[0] for job in jobs]
        if any(job.returncode for job in jobs):
            failed = next(text for job, text in zip(jobs, told, strict=True) if job.returncode)
            return f"{command[0]} failed: {(failed.strip().splitlines() or ['no message'])[0]}"
        target.parent.mkdir(parents=True, exist_ok=True)
        linked = subprocess.run([*command, *flags, "-o", str(target), *objects, *link], capture_output=True, text=True)
        said = linked.stderr.strip().splitlines()
        return f"{command[0]} failed: {(said or ['no message'])[0]}" if linked.returncode else ""
