"""Reads webdataset tars: indexes the members once from their headers, reads a sample in place when it is drawn."""

from __future__ import annotations

import bisect
import re
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from ecoflap.data.formats.json import columns_of, parsed
from ecoflap.data.images import SUFFIXES, BrokenSample
from ecoflap.data.tables import ClassNames, Row, Taken
from ecoflap.errors import CalibrationError

BLOCK = 512
REGULAR = (b"0", b"\0", b"7")
OCTAL, DECIMAL = re.compile(rb"[0-7]{1,12}"), re.compile(r"[0-9]{1,18}")
LONGEST_RECORD = 1 << 20  # bytes of a long name or of a pax header
LARGEST_MEMBER = 1 << 28  # bytes of a member that is read: an image, a text
MOST_KINDS = 1000  # file extensions in one source
MOST_TARS = 100_000  # files of one pattern
LONG_NAME, EXTENDED = b"L", b"x"  # GNU's and POSIX's records for values that are too long for the next header


def headers(file: Path, source: str) -> Iterator[tuple[str, int, int]]:
    """(name, offset of the data, size) of every regular file in a tar; only headers are read.

    The layout is that of POSIX.1-2001 (pax) and of GNU tar. A tar without its end mark is read to its last byte.

    Raises:
        CalibrationError: the tar is compressed, cut off or damaged.
    """
    damaged = CalibrationError(f"{source}: {file.name} is not a whole tar file: copy or download it again")
    length = file.stat().st_size
    long_name, records = "", dict[str, str]()
    position = 0
    with file.open("rb", buffering=0) as raw:
        stream = cast(BinaryIO, raw)
        while header := _read(stream, position, BLOCK):
            if header[:2] == b"\x1f\x8b" and position == 0:
                raise CalibrationError(
                    f"{source}: {file.name} is compressed, so nothing can be drawn from it: gunzip it"
                )
            if header.count(0) == BLOCK:
                return
            size = _number(header[124:136])
            if size is None or len(header) < BLOCK or not _is_whole(header):
                raise damaged
            kind, data = header[156:157], position + BLOCK
            if kind in REGULAR and "size" in records:
                size = _decimal(records["size"])
                if size is None:
                    raise damaged
            position = data + -(-size // BLOCK) * BLOCK
            if position > length or (kind in (LONG_NAME, EXTENDED) and size > LONGEST_RECORD):
                raise damaged
            if kind == LONG_NAME:
                long_name = _text(_read(stream, data, size))
            elif kind == EXTENDED:
                records = _records(_read(stream, data, size))
            else:
                if kind in REGULAR:
                    yield records.get("path") or long_name or _name(header), data, size
                if kind != b"g":
                    long_name, records = "", {}


def _read(stream: BinaryIO, position: int, size: int) -> bytes:
    stream.seek(position)
    return stream.read(size)


def _is_whole(header: bytes) -> bool:
    """Whether the header's checksum is right, computed with eight spaces in the checksum's field."""
    return _number(header[148:156]) == sum(header) - sum(header[148:156]) + 8 * 32


def _number(field: bytes) -> int | None:
    """A number of octal digits, or in GNU's binary form for large sizes; None if it is neither."""
    if field[:1] == b"\x80":
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b"\0 ") or b"0"
    return int(digits, 8) if OCTAL.fullmatch(digits) else None


def _decimal(text: str) -> int | None:
    """A size in a pax record; None if it is invalid."""
    return int(text) if DECIMAL.fullmatch(text) else None


def _name(header: bytes) -> str:
    name, prefix = _text(header[:100]), _text(header[345:500])
    return f"{prefix}/{name}" if prefix and header[257:263] == b"ustar\0" else name


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", errors="replace")


def _records(data: bytes) -> dict[str, str]:
    """``25 path=some/long/name\\n`` records of a pax header; the number is the record's own length."""
    found: dict[str, str] = {}
    while data:
        digits = data.partition(b" ")[0]
        if not DECIMAL.fullmatch(digits.decode("ascii", errors="replace")) or not int(digits):
            break
        key, _, value = data[len(digits) + 1 : int(digits) - 1].partition(b"=")
        found[key.decode("utf-8", errors="replace")] = value.decode("utf-8", errors="replace")
        data = data[int(digits) :]
    return found


BRACES = re.compile(r"\{([^{}]*)\}")
TEXTS = ("txt", "text", "caption", "cap", "transcript", "cls", "cls2", "class", "id", "question", "answer", "prompt")
PICTURES = tuple(suffix[1:] for suffix in SUFFIXES)


def expand(pattern: str) -> list[str]:
    """Names of a brace pattern: ``{000..012}`` counts with leading zeros, ``{a,b}`` lists; several are combined."""
    match = BRACES.search(pattern)
    if match is None:
        return [pattern]
    inner = match[1]
    if bounds := re.fullmatch(r"(\d+)\.\.(\d+)", inner):
        width = len(bounds[1]) if bounds[1].startswith("0") else 0
        if max(len(bounds[1]), len(bounds[2])) > 9 or int(bounds[2]) - int(bounds[1]) >= MOST_TARS:
            raise CalibrationError(f"{pattern} stands for more than {MOST_TARS} files: give them in parts")
        options = [str(number).zfill(width) for number in range(int(bounds[1]), int(bounds[2]) + 1)]
    else:
        options = inner.split(",")
    before, after = pattern[: match.start()], pattern[match.end() :]
    return [name for option in options for name in expand(before + option + after)]


class TarTable:
    """Samples of one or several tars: members with the same name up to the first dot form a sample.

    The columns are the extensions after that dot (``jpg``, ``txt``, ``cls``), and the keys of ``json`` members.
    """

    folder: Path | None = None

    def __init__(self, files: Sequence[Path], source: str) -> None:
        self.source, self._files = source, list(files)
        self.class_names: ClassNames = {}
        self._extensions: list[str] = []
        self._kinds: dict[str, int] = {}
        self._first, self._extension = array("Q"), array("H")  # first member of a sample; kind of a member
        self._offset, self._size = array("Q"), array("Q")
        self._starts = [0]  # first sample of each tar
        for file in self._files:
            self._index(file)
            self._starts.append(len(self._first))
        self._first.append(len(self._offset))
        self.columns = [extension for extension in self._extensions if extension != "json"]
        if "json" in self._extensions:
            known = set(self.columns)
            rows = (row for row in self._members(range(min(len(self), 20)), {"json"}))
            self.columns += [key for key in columns_of(self._only_json(rows), source) if key not in known]

    def __len__(self) -> int:
        return len(self._first) - 1

    def take(self, indices: Sequence[int], columns: Sequence[str]) -> Taken:
        wanted = set(columns)
        if wanted - set(self._extensions):
            wanted.add("json")
        for row in self._members(indices, wanted):
            if isinstance(row, BrokenSample):
                yield row
                continue
            held = row.pop("json", None)
            if isinstance(held, BrokenSample):
                yield held
            else:
                yield {**(held or {}), **row}

    def _members(self, indices: Sequence[int], wanted: set[str]) -> Iterator[Row | BrokenSample]:
        for index in indices:
            file = self._files[bisect.bisect_right(self._starts, index) - 1]
            with file.open("rb") as stream:
                row: Row = {}
                too_large = ""
                for member in range(self._first[index], self._first[index + 1]):
                    extension = self._extensions[self._extension[member]]
                    if extension in wanted and self._size[member] > LARGEST_MEMBER:
                        too_large = f"its {extension} has {self._size[member]} bytes"
                    elif extension in wanted:
                        stream.seek(self._offset[member])
                        row[extension] = _value(extension, stream.read(self._size[member]), index)
                yield BrokenSample(too_large) if too_large else row

    @staticmethod
    def _only_json(rows: Iterator[Row | BrokenSample]) -> Iterator[Row | BrokenSample]:
        return (row if isinstance(row, BrokenSample) else row.get("json") or {} for row in rows)

    def _index(self, file: Path) -> None:
        """Add the members of one tar, sorted by sample: those of one sample are not always neighbours."""
        samples: dict[str, int] = {}
        owner, kind, offsets, sizes = array("Q"), array("H"), array("Q"), array("Q")
        for name, offset, size in headers(file, self.source):
            path, slash, last = name.rpartition("/")
            stem, _, extension = last.partition(".")
            if not stem or not extension:
                continue
            extension = extension.lower()
            if extension not in self._kinds:
                if len(self._extensions) == MOST_KINDS:
                    raise CalibrationError(
                        f"{self.source}: the names in {file.name} have over {MOST_KINDS} endings after a dot, "
                        "so it is unknown which files form a sample: rename them as 000.jpg, 000.txt, ..."
                    )
                self._kinds[extension] = len(self._extensions)
                self._extensions.append(extension)
            owner.append(samples.setdefault(path + slash + stem, len(samples)))
            kind.append(self._kinds[extension])
            offsets.append(offset)
            sizes.append(size)
        before = -1
        for member in np.argsort(np.frombuffer(owner, dtype=np.uint64), kind="stable") if owner else ():
            if owner[member] != before:
                before = owner[member]
                self._first.append(len(self._offset))
            self._extension.append(kind[member])
            self._offset.append(offsets[member])
            self._size.append(sizes[member])


def _value(extension: str, data: bytes, index: int) -> Any:
    if extension == "json":
        return parsed(data, index)
    last = extension.rpartition(".")[2]
    if last in PICTURES:
        return data
    if last in TEXTS:
        return data.decode("utf-8", errors="replace").strip()
    return data


def open_tars(files: Sequence[Path], source: str) -> TarTable:
    """The samples of ``files``.

    Raises:
        CalibrationError: one is not there, is damaged or compressed.
    """
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise CalibrationError(
            f"{source}: {len(missing)} of {len(files)} tars are not there, the first is {missing[0]}"
        )
    table = TarTable(files, source)
    if len(table) == 0:
        raise CalibrationError(f"{source} is empty: it holds no samples")
    return table
