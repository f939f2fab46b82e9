"""Files compressed with gzip, bzip2, xz or zstandard, read as a stream."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from ecoflap.errors import CalibrationError

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")


@contextmanager
def open_binary(file: Path, source: str) -> Iterator[BinaryIO]:
    """The decompressed bytes of ``file``, by its suffix; a file without such a suffix as it is.

    Raises:
        CalibrationError: it is damaged, or ends too early.
    """
    try:
        with _opened(file) as stream:
            yield stream
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
        import pyarrow as pa  # has the decoder that Python gets only in 3.14

        return cast(BinaryIO, io.BufferedReader(pa.input_stream(str(file), compression="zstd"), 1 << 20))
    return file.open("rb")
