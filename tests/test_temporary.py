"""Temporary folders: removed with their process, or by the next one if it was killed."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from ecoflap.support.temporary import TemporaryFolder


def test_abandoned_folders_are_removed_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    abandoned = tmp_path / "ecoflap-weights-gone"  # as a kill leaves it: nobody holds its lock
    abandoned.mkdir()
    (abandoned / "w.safetensors").write_bytes(b"0")
    elsewhere = tmp_path / "thesis"
    elsewhere.mkdir()
    (tmp_path / "ecoflap-weights-link").symlink_to(elsewhere)
    (tmp_path / "ecoflap-weights-file").write_text("mine")
    first = TemporaryFolder("ecoflap-weights-")
    assert not abandoned.exists()
    second = TemporaryFolder("ecoflap-weights-")
    assert first.path.is_dir()
    assert second.path.is_dir()
    assert second.path.name.startswith("ecoflap-weights-")
    assert elsewhere.is_dir()
    assert (tmp_path / "ecoflap-weights-file").read_text() == "mine"
    for folder in (first, first, second):
        folder.remove()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "ecoflap-weights-file",
        "ecoflap-weights-link",
        "thesis",
    ]
