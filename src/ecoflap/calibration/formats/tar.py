"""The headers of a tar file, one after the other, without its contents and without remembering them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from ecoflap.errors import CalibrationError

BLOCK = 512
REGULAR = (b"0", b"\0", b"7")
LONG_NAME, EXTENDED = b"L", b"x"  # GNU's and POSIX's records for what has no room in the next header


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
                size = int(records["size"])
            position = data + -(-size // BLOCK) * BLOCK
            if position > length:
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
    """Whether the header's sum is what it says, its own field counted as eight spaces."""
    return _number(header[148:156]) == sum(header) - sum(header[148:156]) + 8 * 32


def _number(field: bytes) -> int | None:
    """Octal digits, or GNU's binary form for large sizes; None if it is neither."""
    if field[:1] == b"\x80":
        return int.from_bytes(field[1:], "big")
    try:
        return int(field.strip(b"\0 ") or b"0", 8)
    except ValueError:
        return None


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
        if not digits.isdigit() or not int(digits):
            break
        key, _, value = data[len(digits) + 1 : int(digits) - 1].partition(b"=")
        found[key.decode("utf-8", errors="replace")] = value.decode("utf-8", errors="replace")
        data = data[int(digits) :]
    return found
