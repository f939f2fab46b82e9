"""Webdataset tars: grouping, shards, damage, and that pictures are read only when they are drawn."""

import io
import json
import random
import tarfile
import tempfile
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import made
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ecoflap.data import load_samples
from ecoflap.data.formats.webdataset import TarTable, expand
from ecoflap.errors import CalibrationError

Members = Sequence[tuple[str, bytes]]


def tar(path: Path, members: Members, form: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as archive:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))
    return path


def shard(numbers: Sequence[int]) -> Members:
    return [
        member
        for n in numbers
        for member in (
            (f"{n:06d}.png", made.png(n % 50)),
            (f"{n:06d}.txt", f"caption {n}".encode()),
            (f"{n:06d}.json", json.dumps({"width": n, "category": f"k{n % 2}"}).encode()),
        )
    ]


def test_shards_are_one_table(tmp_path: Path) -> None:
    for k in range(3):
        tar(tmp_path / f"data-{k:03d}.tar", shard(range(10 * k, 10 * k + 10)))
    for source in (tmp_path, f"{tmp_path}/data-{{000..002}}.tar", f"{tmp_path}/data-{{000,001,002}}.tar"):
        drawn = load_samples(source, samples=12, seed=4)
        assert drawn.columns == {"image": "png", "text": "txt", "label": "category"}
        assert len(set(drawn.indices)) == 12
        for index, sample in zip(drawn.indices, drawn.samples, strict=True):
            assert (sample.text, sample.label) == (f"caption {index}", f"k{index % 2}")
            assert made.shows(sample, index)
    whole = load_samples(tmp_path / "data-001.tar", samples=None, seed=0).samples
    assert [sample.text for sample in whole] == [f"caption {n}" for n in range(10, 20)]
    with pytest.raises(CalibrationError, match=r"2 of 5 tars are not there, the first is .*data-003.tar"):
        load_samples(f"{tmp_path}/data-{{000..004}}.tar", samples=1, seed=0)


def test_brace_patterns() -> None:
    assert expand("a{08..11}.tar") == ["a08.tar", "a09.tar", "a10.tar", "a11.tar"]
    assert expand("{8..10}{x,y}") == ["8x", "8y", "9x", "9y", "10x", "10y"]
    assert expand("plain.tar") == ["plain.tar"]


def test_members_in_any_order_and_kinds(tmp_path: Path) -> None:
    members = [
        ("s/b.jpg", made.png(1)),
        ("s/a.v1.cls", b"7\n"),
        ("s/a.jpg", made.png(0)),
        ("s/._a.jpg", b"left by a Mac"),
        ("s/b.v1.cls", b"3"),
        ("README", b"no sample"),
        (f"s/{'long' * 60}.jpg", made.png(2)),
    ]
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        table = TarTable([tar(tmp_path / "a.tar", members, form)], "a.tar")
        assert len(table) == 3
        assert table.columns == ["jpg", "v1.cls"]
        rows = list(table.take([1, 0, 2], ["jpg", "v1.cls"]))
        assert rows == [
            {"jpg": made.png(0), "v1.cls": "7"},
            {"jpg": made.png(1), "v1.cls": "3"},
            {"jpg": made.png(2)},
        ]


def test_samples_that_lack_a_member_are_broken(tmp_path: Path) -> None:
    members = [member for member in shard(range(60)) if member[0] not in ("000007.txt", "000009.png")]
    drawn = load_samples(tar(tmp_path / "a.tar", members), samples=None, seed=0)
    assert (len(drawn.samples), drawn.skipped) == (58, 2)
    assert not {7, 9} & set(drawn.indices)


def test_damage_is_one_clear_line(tmp_path: Path) -> None:
    whole = tar(tmp_path / "whole.tar", shard(range(20))).read_bytes()
    end = len(whole.rstrip(b"\0"))
    broken = {
        "data.tar": whole[: end // 2],
        "header.tar": whole[: (end // 2 // 512) * 512 + 100],
        "garbage.tar": b"no tar at all" * 100,
        "middle.tar": whole[: 512 * 4] + b"\xff" * 512 + whole[512 * 5 :],
    }
    for name, data in broken.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(CalibrationError, match=f"{name} is not a whole tar file") as caught:
            load_samples(tmp_path / name, samples=1, seed=0)
        assert "\n" not in str(caught.value)
    import gzip

    (tmp_path / "packed.tar").write_bytes(gzip.compress(whole))
    with pytest.raises(CalibrationError, match=r"packed.tar is compressed.*gunzip"):
        load_samples(tmp_path / "packed.tar", samples=1, seed=0)
    tar(tmp_path / "none.tar", [])
    with pytest.raises(CalibrationError, match="is empty: it holds no samples"):
        load_samples(tmp_path / "none.tar", samples=1, seed=0)


def test_every_cut_is_noticed_or_at_a_member(tmp_path: Path) -> None:
    """A tar cut anywhere is refused, except between two members, where nothing in the format can tell."""
    whole = tar(tmp_path / "whole.tar", [(f"{n}.txt", b"x" * 700) for n in range(4)]).read_bytes()
    member = 512 + 1024
    for length in range(1, 4 * member, 97):
        (tmp_path / "cut.tar").write_bytes(whole[:length])
        if length % member == 0:
            assert len(TarTable([tmp_path / "cut.tar"], "x")) == length // member
        else:
            with pytest.raises(CalibrationError, match="not a whole tar file"):
                TarTable([tmp_path / "cut.tar"], "x")


NAMES = st.lists(
    st.tuples(
        st.text("ab/ .é", min_size=1, max_size=6).filter(lambda name: name.strip("/ .") != ""),
        st.sampled_from(["txt", "png", "seg.png", "TXT", "bin"]),
        st.binary(max_size=1200),
    ),
    max_size=12,
)


@settings(max_examples=40, deadline=None)
@example([("aa", "txt", b""), ("/aa", "txt", b"")])
@given(NAMES)
def test_any_tar_is_indexed_as_tarfile_reads_it(names: list[tuple[str, str, bytes]]) -> None:
    """Against the slow way: unpack all, group by name up to the first dot."""
    members = [(f"{stem}.{extension}", data) for stem, extension, data in names]
    with tempfile.TemporaryDirectory() as folder:
        path = tar(Path(folder) / "a.tar", members)
        expected: dict[str, dict[str, bytes]] = {}
        with tarfile.open(path) as archive:
            for member in archive.getmembers():
                directory, slash, name = member.name.rpartition("/")
                stem, dot, extension = name.partition(".")
                if stem and dot and extension:
                    data = archive.extractfile(member)
                    assert data is not None
                    # "a.txt" and "/a.txt" are two samples: the whole path up to the dot is the key.
                    expected.setdefault(f"{directory}{slash}{stem}", {})[extension.lower()] = data.read()
        table = TarTable([path], "a.tar")
        assert len(table) == len(expected)
        for row, members_of in zip(
            table._members(range(len(table)), {"png", "seg.png", "bin"}), expected.values(), strict=True
        ):
            assert row == {key: value for key, value in members_of.items() if key in ("png", "seg.png", "bin")}


def test_a_large_tar_is_sampled_without_reading_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """20,000 samples of 4 KiB: the index reads headers, the draw reads what it draws, and memory stays small."""
    count, size = 20_000, 2048
    header = tarfile.TarInfo("")
    header.size = size
    with (tmp_path / "big.tar").open("wb") as stream:
        for n in range(count):
            header.name = f"{n:06d}.txt"
            stream.write(header.tobuf(tarfile.USTAR_FORMAT) + f"{n} ".encode().ljust(size, b"x"))
        stream.write(b"\0" * 1024)
    total = count * (size + 512)
    read = 0
    original = Path.open

    class Counting(io.FileIO):
        def readinto(self, buffer: Any, /) -> int:
            nonlocal read
            done = super().readinto(buffer)
            read += done
            return done

        def read(self, size: int | None = -1, /) -> bytes:
            nonlocal read
            data = super().read(size)
            read += len(data)
            return data

    def counted(self: Path, mode: str = "r", buffering: int = -1, **options: Any) -> Any:
        if mode == "rb":
            return Counting(self) if buffering == 0 else io.BufferedReader(Counting(self))
        return original(self, mode, buffering, **options)

    monkeypatch.setattr(Path, "open", counted)
    table = TarTable([tmp_path / "big.tar"], "big.tar")
    assert read <= (count + 2) * 512
    tracemalloc.start()
    drawn = list(table.take(random.Random(0).sample(range(count), 64), ["txt"]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len({row["txt"].split()[0] for row in drawn if isinstance(row, dict)}) == 64
    assert read <= (count + 2) * 512 + 64 * 2 * io.DEFAULT_BUFFER_SIZE < total / 4
    assert peak < 1 << 20


def test_the_index_of_a_large_tar_is_small(tmp_path: Path) -> None:
    """Far less than what Python's own reader keeps (half a kilobyte a member)."""
    path = tar(tmp_path / "a.tar", [(f"{n:06d}.{kind}", b"") for n in range(2000) for kind in ("jpg", "txt")])
    tracemalloc.start()
    table = TarTable([path], "a.tar")
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(table) == 2000
    assert kept < 4000 * 64
    assert peak < 4000 * 256


@pytest.mark.parametrize("names", [("image.png", "caption.txt"), ("img.PNG", "txt"), ("input.image.png", "json")])
def test_members_with_names_of_their_own(names: tuple[str, str], tmp_path: Path) -> None:
    rows = [(made.png(n), json.dumps({"caption": f"c{n}"}) if names[1] == "json" else f"c{n}") for n in range(3)]
    source = tar(
        tmp_path / "a.tar",
        [(f"{n:03d}.{end}", data if isinstance(data, bytes) else data.encode())
         for n, row in enumerate(rows) for end, data in zip(names, row, strict=True)],
    )  # fmt: skip
    if "input" in names[0]:  # nothing says that this is the picture
        with pytest.raises(CalibrationError, match=r"has images \(input.image.png\).*image=input.image.png"):
            load_samples(source, samples=None, seed=0)
    chosen = {"image": names[0]} if "input" in names[0] else None
    drawn = load_samples(source, samples=None, seed=0, columns=chosen)
    assert [sample.text for sample in drawn.samples] == ["c0", "c1", "c2"]
    assert all(made.shows(sample, index) for index, sample in zip(drawn.indices, drawn.samples, strict=True))
    assert not load_samples(source, samples=None, seed=0, columns={"image": ""}).samples[0].images
