"""Reads plain text for windows: whole files, or seeded pieces of large ones.

Files compressed with gzip, bzip2, xz or zstandard are read as a stream.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from ecoflap.errors import CalibrationError

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")


@contextmanager
def open_binary(file: Path, source: str) -> Iterator[BinaryIO]:
    """The decompressed bytes of ``file``; its suffix names the compression, if any.

    Raises:
        CalibrationError: it is damaged, or ends too early.
    """
    try:
        with _opened(file) as stream:
            packed = file.suffix.lower() in COMPRESSED
            yield io.BufferedReader(_Bounded(stream, file, source), 1 << 20) if packed else stream
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise CalibrationError(f"{source} cannot be decompressed ({error}): is it whole?") from error


def _opened(file: Path) -> BinaryIO:
    suffix = file.suffix.lower()
    if suffix == ".gz":
        return cast(BinaryIO, gzip.open(file))
    if suffix == ".bz2":
        return cast(BinaryIO, bz2.open(file))
    if suffix == ".xz":
        return cast(BinaryIO, lzma.open(file))
    if suffix == ".zst":
        import pyarrow as pa  # Python has this decoder only from 3.14 on

        return cast(BinaryIO, io.BufferedReader(pa.input_stream(str(file), compression="zstd"), 1 << 20))
    return file.open("rb")


class _Bounded(io.RawIOBase):
    """Decompressed bytes, at most :data:`MOST_UNPACKED` times those of the file.

    Raises:
        CalibrationError: there are more. Text compresses to about a tenth; a malicious file may expand to terabytes.
    """

    def __init__(self, stream: BinaryIO, file: Path, source: str) -> None:
        self._stream, self._source = stream, source
        self._left = max(READ_WHOLE, MOST_UNPACKED * file.stat().st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(min(len(buffer), 1 << 20))
        self._left -= len(data)
        if self._left < 0:
            raise CalibrationError(
                f"{self._source} unpacks to over {MOST_UNPACKED} times its size and is not read: unpack it first"
            )
        buffer[: len(data)] = data
        return len(data)


MOST_UNPACKED = 100
SUFFIXES = (".txt", ".text", ".md", ".raw", ".tokens")
READ_WHOLE = 64 << 20  # bytes; from larger texts, seeded pieces are read
PIECE = 65_536  # bytes of a piece; one for each requested window


class TextFiles:
    """Text files, in the order of their names; one document a file."""

    def __init__(self, files: Sequence[Path], source: str) -> None:
        self.source, self._files = source, list(files)
        self._sizes = [file.stat().st_size for file in files]
        if not any(document.strip() for document in self._some()):
            raise CalibrationError(f"{source} is empty: give a text with something in it")

    def __len__(self) -> int:
        return len(self._files)

    def draw(self, windows: int | None, seed: int) -> Iterator[tuple[int, str]]:
        """(number, text) of the documents; for a large text, of one seeded piece for each window.

        Args:
            windows: number of windows that will be cut from the text; None for the whole text.
        """
        if windows is None or sum(self._sizes) <= READ_WHOLE:
            yield from ((number, self._whole(file)) for number, file in enumerate(self._files))
            return
        pieces = [
            (file, start)
            for file, size in zip(self._files, self._sizes, strict=True)
            for start in range(0, size, PIECE)
        ]
        import torch  # not where the module is read, see ecoflap.run.checks

        order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(seed))
        for number in order[:windows].tolist():
            yield number, self._piece(*pieces[number])

    def _some(self) -> Iterator[str]:
        if sum(self._sizes) <= READ_WHOLE:
            return (self._whole(file) for file in self._files)
        return (self._piece(file, 0) for file in self._files)

    def _whole(self, file: Path) -> str:
        with open_binary(file, str(file)) as stream:
            return _decoded(stream.read(), file, 0)

    def _piece(self, file: Path, start: int) -> str:
        """The complete lines of a piece; without line ends, its complete characters."""
        if file.suffix.lower() in COMPRESSED:
            return self._whole(file) if start == 0 else ""
        with file.open("rb") as stream:
            stream.seek(start)
            data = stream.read(PIECE)
            if start:
                data = data[data.find(b"\n") + 1 :]
            if stream.read(1):
                data = data[: data.rfind(b"\n") + 1] or data
        if b"\n" in data:
            return _decoded(data, file, start)
        return data.decode("utf-8", errors="ignore")


def _decoded(data: bytes, file: Path, start: int) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{file} is not UTF-8 text (byte {start + error.start}): convert it first") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")
