"""Reading JSON files that users may have edited: every fault is one line with the file's name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ecoflap.data.formats.csv import CsvTable
from ecoflap.errors import CalibrationError, InvalidOption, OutputExists, StorageError
from ecoflap.model.replace import check_replaceable
from ecoflap.support.files import PARTIAL, write_json, write_text
from ecoflap.support.reading import read_json


def test_what_is_written_is_read(tmp_path: Path) -> None:
    data = {"a": [1, 2.5, None, "ü"], "b": {"c": True}}
    path = tmp_path / "new" / "folder" / "a.json"
    write_json(path, data)
    assert read_json(path, "the file") == data
    assert path.read_text("utf-8").startswith('{\n "a": [\n')
    assert "ü" in path.read_text("utf-8")
    assert [entry.name for entry in path.parent.iterdir()] == ["a.json"]


def test_a_replaced_file_is_whole_for_a_reader(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with path.open() as reader:
        write_text(path, "new")
        assert reader.read() == "old"
    assert path.read_text("utf-8") == "new"
    assert not list(tmp_path.glob(f"*{PARTIAL}"))


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'{"a": 1} x'])
def test_damaged(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(
        InvalidOption, match=r"can't read the allocation .*a\.json: it is (no whole JSON|not UTF-8 text)"
    ):
        read_json(path, "the allocation")


def test_other_encodings_are_told_without_pythons_words(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes('{"a": "grün"}'.encode("latin-1"))
    with pytest.raises(InvalidOption, match=r"a\.json: it is not UTF-8 text \(byte 9\): convert it first$"):
        read_json(tmp_path / "a.json", "the allocation")
    (tmp_path / "a.csv").write_bytes("text\ngrün\n".encode("latin-1"))
    with pytest.raises(CalibrationError, match=r"it is not UTF-8 text, convert it first$"):
        CsvTable(tmp_path / "a.csv", "a.csv")


def test_absent(tmp_path: Path) -> None:
    with pytest.raises(InvalidOption, match=r"can't read the allocation .*b\.json: No such file or directory"):
        read_json(tmp_path / "b.json", "the allocation")
    with pytest.raises(InvalidOption, match="Is a directory"):
        read_json(tmp_path, "the allocation")


def test_what_is_no_plain_file_stays(tmp_path: Path) -> None:
    """A pipe stands for devices: a test must not try its luck with /dev/null."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for target in (pipe, tmp_path):
        with pytest.raises(StorageError, match="not a regular file"):
            write_text(target, "x")
        with pytest.raises(OutputExists, match="is no folder" if target == pipe else "already holds something"):
            check_replaceable(target, overwrite=False)
    with pytest.raises(OutputExists, match="is no folder"):
        check_replaceable(pipe, overwrite=True)
    (tmp_path / "lost").symlink_to("nowhere")
    with pytest.raises(OutputExists, match="is no folder"):
        check_replaceable(tmp_path / "lost", overwrite=True)
    assert pipe.is_fifo()
    assert {entry.name for entry in tmp_path.iterdir()} == {"pipe", "lost"}
