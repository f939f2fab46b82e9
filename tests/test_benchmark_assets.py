"""The benchmarks' assets: R's serialisation read from bytes made by hand, unpacking that stays in its folder."""

import gzip
import importlib.util
import struct
import sys
import zipfile
import zlib
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def assets() -> ModuleType:
    path = Path(__file__).parent.parent / "benchmarks" / "assets.py"
    spec = importlib.util.spec_from_file_location("benchmark_assets", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _string(text: str | None) -> bytes:
    if text is None:
        return struct.pack(">Ii", 9, -1)
    data = text.encode()
    return struct.pack(">Ii", 9 | 0x8000, len(data)) + data


def _strings(*texts: str | None) -> bytes:
    return struct.pack(">Ii", 16, len(texts)) + b"".join(_string(text) for text in texts)


def _named(values: dict[str, bytes]) -> bytes:
    names = struct.pack(">II", 0x402, 1) + _string("names") + _strings(*values) + struct.pack(">I", 0xFE)
    return struct.pack(">Ii", 19 | 0x200, len(values)) + b"".join(values.values()) + names


def _stream(value: bytes, version: int = 3) -> bytes:
    head = b"X\n" + struct.pack(">iii", version, 0x40201, 0x30500)
    return head + (struct.pack(">i", 5) + b"UTF-8" if version == 3 else b"") + value


@pytest.mark.parametrize("version", [2, 3])
def test_r_vectors_lists_and_names(assets: ModuleType, version: int) -> None:
    numbers = struct.pack(">Ii3i", 13, 3, 4, -5, 6)
    reals = struct.pack(">Iid", 14, 1, 2.5)
    read = assets.read_r(_stream(_named({"text": _strings("É", "", None), "n": numbers, "x": reals}), version))
    assert read == {"text": ["É", "", None], "n": [4, -5, 6], "x": [2.5]}
    with pytest.raises(ValueError, match="type 24"):
        assets.read_r(_stream(struct.pack(">Ii", 24, 0)))
    with pytest.raises(ValueError, match="XDR"):
        assets.read_r(b"A\n1234")


def test_an_r_database_is_read_by_its_index(assets: ModuleType, tmp_path: Path) -> None:
    data, places = b"", {}
    for name, lines in {"one": ("first line", "second"), "two": ("alone",)}.items():
        raw = _stream(_strings(*lines))
        packed = struct.pack(">I", len(raw)) + zlib.compress(raw)
        places[name] = struct.pack(">Ii2i", 13, 2, len(data), len(packed))
        data += packed
    (tmp_path / "d.rdb").write_bytes(data)
    (tmp_path / "d.rdx").write_bytes(gzip.compress(_stream(_named({"variables": _named(places)}))))
    assert assets.read_r_database(tmp_path / "d.rdx") == {"one": ["first line", "second"], "two": ["alone"]}


def test_only_wanted_members_are_unpacked_and_none_outside(assets: ModuleType, tmp_path: Path) -> None:
    archive = tmp_path / "a.whl"
    with zipfile.ZipFile(archive, "w") as stream:
        stream.writestr("p/data/x/1.png", b"1")
        stream.writestr("p/data/code.py", b"2")
        stream.writestr("other/1.png", b"3")
    assets._unzip(archive, "p/data/", tmp_path / "out", (".png",))
    assert [p.relative_to(tmp_path).as_posix() for p in (tmp_path / "out").rglob("*.*")] == ["out/x/1.png"]
    with zipfile.ZipFile(archive, "a") as stream:
        stream.writestr("p/data/../../evil.png", b"4")
    with pytest.raises(assets.AssetUnavailable, match="outside"):
        assets._unzip(archive, "p/data/", tmp_path / "out", (".png",))
    assert not (tmp_path / "evil.png").exists()


def test_a_failed_fetch_leaves_nothing_and_a_second_one_fetches_nothing(
    assets: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(scratch: Path, made: Path) -> None:
        (made / "half").write_text("")
        raise assets.AssetUnavailable("no network")

    monkeypatch.setitem(assets.ASSETS, "prose", fail)
    with pytest.raises(assets.AssetUnavailable, match="no network"):
        assets.fetch("prose", tmp_path)
    assert list(tmp_path.iterdir()) == []

    monkeypatch.setitem(assets.ASSETS, "prose", lambda scratch, made: (made / "whole").write_text(""))
    monkeypatch.setenv("ECOFLAP_CACHE", str(tmp_path))
    folder = assets.fetch("prose")
    assert [p.name for p in folder.iterdir()] == ["whole"]
    monkeypatch.setitem(assets.ASSETS, "prose", fail)
    assert assets.fetch("prose") == folder == tmp_path / "prose"


def test_a_wheel_with_another_content_than_the_pinned_one_is_refused(
    assets: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assets, "_run", lambda command, folder: (folder / "x.whl").write_bytes(b"not it"))
    with pytest.raises(assets.AssetUnavailable, match="sha256"):
        assets._wheel("easy-vqa==1.0", tmp_path)
