"""Data that unpacks to more than it seems, never ends, or lies about itself: it is bounded, and one line says so."""

from __future__ import annotations

import csv
import gzip
import io
import json
import struct
import tarfile
import unicodedata
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import made
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ecoflap.data import images, load_samples
from ecoflap.data.formats import text
from ecoflap.data.formats.webdataset import expand, headers
from ecoflap.data.images import BrokenSample, ImageFinder, decode
from ecoflap.data.prompts import LEAST_KEPT, pixels_used
from ecoflap.data.sources import open_source
from ecoflap.errors import CalibrationError


def gradient(width: int, height: int) -> np.ndarray:
    """A picture that is red to the right and green to the bottom, so that a turned or cut one shows."""
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack([columns * 255 // width, rows * 255 // height, np.full_like(rows, 90)], -1).astype(np.uint8)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("size", [(640, 480), (37, 900), (901, 33)])
def test_a_large_picture_is_made_smaller_while_it_is_decoded(form: str, size: tuple[int, int]) -> None:
    pixels, stream = gradient(*size), io.BytesIO()
    Image.fromarray(pixels).save(stream, form, quality=95)
    most = 5000
    (small,) = decode(stream.getvalue(), ImageFinder(None, None, most))
    assert most / 2 < small.width * small.height <= most
    assert abs(small.width / small.height - size[0] / size[1]) <= 0.1 * size[0] / size[1]
    wanted = gradient(*small.size).astype(float)
    assert np.abs(np.asarray(small).astype(float) - wanted).mean() < 6
    (whole,) = decode(stream.getvalue(), ImageFinder(None, None, size[0] * size[1]))
    assert whole.size == size
    if form in ("PNG", "TIFF"):
        assert np.array_equal(np.asarray(whole), pixels)


def test_a_large_picture_keeps_its_turn_and_its_depth() -> None:
    turned, stream = gradient(300, 100), io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    Image.fromarray(turned).save(stream, "JPEG", exif=exif)
    (small,) = decode(stream.getvalue(), ImageFinder(None, None, 3000))
    assert small.height > small.width
    deep = np.linspace(0, 65535, 300 * 100).reshape(100, 300).astype(np.uint16)
    (grey,) = decode(Image.fromarray(deep), ImageFinder(None, None, 3000))
    assert (np.asarray(grey)[0, 0, 0] < 20, np.asarray(grey)[-1, -1, 0] > 235) == (True, True)


def header_of(width: int, height: int) -> bytes:
    """A PNG whose header promises so many pixels."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return b"\x89PNG\r\n\x1a\n" + chunks + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


def test_a_picture_that_pillow_warns_of_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BrokenSample, match="an image of 13000 × 13000 pixels"):
        decode(header_of(13_000, 13_000), ImageFinder(None))
    with pytest.raises(BrokenSample, match="DecompressionBombError"):
        decode(header_of(50_000, 50_000), ImageFinder(None))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # the user's own decision, in Python
    with pytest.raises(BrokenSample, match="unreadable image"):  # this one holds nothing
        decode(header_of(5000, 5000), ImageFinder(None))


def test_what_can_not_be_decoded_smaller_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BrokenSample, match=r"9000 × 9000 pixels, for which PNG decoding takes 386 MiB"):
        decode(header_of(9000, 9000), ImageFinder(None))
    monkeypatch.setattr(images, "MOST_DECODED", 300 * 100 * 5 - 1)
    for form in ("PNG", "TIFF", "JPEG"):
        stream = io.BytesIO()
        Image.fromarray(gradient(300, 100)).save(stream, form)
        if form == "JPEG":
            assert decode(stream.getvalue(), ImageFinder(None, None, 7500))
            continue
        with pytest.raises(BrokenSample, match=f"for which {form} decoding"):
            decode(stream.getvalue(), ImageFinder(None, None, 7500))


@pytest.mark.parametrize("kind", [np.uint16, np.float32, np.int32])
def test_deep_grey_in_bands_is_as_at_once(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(3000, 900, (57, 31)).astype(kind)
    if kind is np.float32:
        values[0, :3] = np.nan, np.inf, -np.inf
    (at_once,) = decode(Image.fromarray(values), ImageFinder(None))
    monkeypatch.setattr(images, "VALUES", 100)  # three rows
    (in_bands,) = decode(Image.fromarray(values), ImageFinder(None))
    assert np.array_equal(np.asarray(at_once), np.asarray(in_bands))
    finite = values[np.isfinite(values)].astype(float)
    low, high = (0, 65535) if finite.min() >= 0 and finite.max() <= 65535 else (finite.min(), finite.max())
    filled = np.nan_to_num(values.astype(float), nan=low, posinf=finite.max(), neginf=finite.min())
    assert np.array_equal(
        np.asarray(in_bands)[..., 0], ((filled - low) * (255 / (high - low))).round().astype(np.uint8)
    )


class _Processor:
    def __init__(self, **facts: Any) -> None:
        self.tokenizer, self.image_processor = None, self
        vars(self).update(facts)


@pytest.mark.parametrize(
    ("facts", "pixels"),
    [
        ({}, LEAST_KEPT),
        ({"size": {"height": 224, "width": 224}}, LEAST_KEPT),
        ({"size": {"shortest_edge": 3136, "longest_edge": 12_845_056}}, 12_845_056),
        ({"size": {"longest_edge": 3000}}, 9_000_000),
        ({"max_pixels": 6_000_000, "size": 224}, 6_000_000),
        ({"image_grid_pinpoints": [[336, 672], [2500, 2500]]}, 6_250_000),
        ({"max_pixels": 10**12}, 1 << 24),
    ],
)
def test_what_a_processor_makes_use_of(facts: dict[str, Any], pixels: int) -> None:
    assert pixels_used(_Processor(**facts)) == pixels


@pytest.mark.parametrize("suffix", [".txt.gz", ".jsonl.gz"])
def test_what_unpacks_to_far_more_is_not_read(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "READ_WHOLE", 1 << 16)
    path = tmp_path / f"a{suffix}"
    path.write_bytes(gzip.compress(b"0" * (1 << 22)))
    with pytest.raises(CalibrationError, match="unpacks to over 100 times its size"):
        open_source(path)
    lines = "".join(json.dumps({"text": f"{n} words of {n * n}"}) + "\n" for n in range(2000))
    path.write_bytes(gzip.compress(lines.encode()))
    assert len(open_source(path)) == (1 if suffix == ".txt.gz" else 2000)


def tar_header(name: str, size: bytes, kind: bytes = b"0") -> bytes:
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT))
    block[124:136], block[156:157] = size.ljust(12, b"\0"), kind
    block[148:156] = b"%06o\0 " % (sum(block) - sum(block[148:156]) + 8 * 32)
    return bytes(block)


@pytest.mark.parametrize(
    "size", [b"-1000", b"-1", b"+7", b"1_0", b" 1 1", b"999", b"\x80" + b"\xff" * 11, b"\xff" * 12, "³".encode()]
)
def test_a_size_that_is_none_ends_the_tar(tmp_path: Path, size: bytes) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(tar_header("a.txt", b"0") + tar_header("b.txt", size) + b"\0" * 1024)
    with pytest.raises(CalibrationError, match="not a whole tar file"):
        list(headers(path, "a.tar"))


@pytest.mark.parametrize("size", ["-512", "x", "9" * 5000, "1e3", "", "٣"])
def test_a_size_in_a_pax_header_that_is_none_ends_the_tar(tmp_path: Path, size: str) -> None:
    record = f" size={size}\n".encode()
    record = str(len(record) + len(str(len(record)))).encode() + record
    data = record.ljust(-(-len(record) // 512) * 512, b"\0")
    path = tmp_path / "a.tar"
    path.write_bytes(tar_header("p", b"%o" % len(record), b"x") + data + tar_header("a.txt", b"0") + b"\0" * 1024)
    with pytest.raises(CalibrationError, match="not a whole tar file"):
        list(headers(path, "a.tar"))


def test_endless_names_and_patterns_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for number in range(1001):
            archive.addfile(tarfile.TarInfo(f"x.kind{number}"))
    with pytest.raises(CalibrationError, match="over 1000 endings"):
        open_source(tmp_path / "a.tar")
    with pytest.raises(CalibrationError, match="more than 100000 files"):
        expand("a-{0..999999999}.tar")
    assert len(expand("a-{00..11}{a,b}.tar")) == 24


def _members(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def test_samples_may_name_their_pictures_differently(tmp_path: Path) -> None:
    kinds = ("jpg", "png", "webp", "gif")
    _members(
        tmp_path / "a.tar",
        {f"{n}.{what}": data for n, kind in enumerate(kinds) for what, data in ((kind, made.png(n)), ("txt", b"t"))},
    )
    drawn = load_samples(tmp_path / "a.tar", samples=None, seed=0).samples
    assert [made.shows(sample, number) for number, sample in enumerate(drawn)] == [True] * 4
    made.pictures(tmp_path, ["p/0.png", "p/1.png", "p/2.png"])
    rows: list[dict[str, Any]] = [
        {"image": "p/0.png", "text": "a"}, {"image_path": "p/1.png", "text": "b"}, {"img": "p/2.png", "text": "c"}
    ]  # fmt: skip
    lines = made.write_lines(tmp_path / "rows.jsonl", rows)
    with (tmp_path / "rows.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["image", "image_path", "img", "text"], restval="")
        writer.writeheader()
        writer.writerows(rows)
    for source in (lines, tmp_path / "rows.csv"):
        drawn = load_samples(source, samples=None, seed=0).samples
        assert [made.shows(sample, number) for number, sample in enumerate(drawn)] == [True] * 3
    with pytest.raises(CalibrationError, match="the image is missing"):  # what the user chose is meant alone
        load_samples(lines, samples=None, seed=0, columns={"image": "image"})


def test_metadata_deep_below_names_pictures_in_any_spelling(tmp_path: Path) -> None:
    name = "dämmerung.png"
    made.pictures(tmp_path, ["top.png", f"a/b/{unicodedata.normalize('NFD', name)}", "a/c/d/deep.png"])
    made.write_lines(tmp_path / "metadata.jsonl", [{"file_name": "top.png", "text": "top"}])
    nfc = unicodedata.normalize("NFC", name)
    made.write_lines(tmp_path / "a" / "b" / "metadata.jsonl", [{"file_name": nfc, "text": "dusk"}])
    made.write_lines(tmp_path / "a" / "metadata.jsonl", [{"file_name": r"c\d\deep.png", "text": "deep"}])
    drawn = load_samples(tmp_path, samples=None, seed=0).samples
    assert {sample.text: made.shows(sample, n) for n, sample in zip((0, 2, 1), drawn, strict=True)} == {
        "top": True, "deep": True, "dusk": True
    }  # fmt: skip


def test_half_a_character_does_not_end_a_run(tmp_path: Path) -> None:
    made.pictures(tmp_path, ["0.png"])
    (tmp_path / "a.jsonl").write_text('{"image": "0.png", "caption": "a \\ud83d cut \\uD83D\\uDE00"}\n')
    (sample,) = load_samples(tmp_path / "a.jsonl", samples=None, seed=0).samples
    assert sample.text == "a \ufffd cut \U0001f600"


COCO = {
    "images": [{"id": 1, "file_name": "0.png"}],
    "annotations": [{"id": 1, "image_id": 1, "caption": "a circle"}],
}
VQA = {"questions": [{"question_id": 1, "image_id": 1, "question": "what ?", "image": "0.png"}], "data_type": "x"}
KARPATHY = {"images": [{"filename": "0.png", "split": "train", "sentences": [{"raw": "a circle"}]}], "dataset": "coco"}
CHAT = [{"image": "0.png", "conversations": [{"from": "human", "value": "<image>\nhi"}, {"from": "gpt", "value": "a"}]}]
CHOICES = [{"question": "?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answer": "A", "answers": [{}]}]
DOCUMENTS = {"coco": COCO, "vqa": VQA, "karpathy": KARPATHY, "chat": CHAT, "choices": CHOICES}
ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=6,
)


def _put(value: Any, steps: list[int], new: Any) -> Any:
    if not steps or not isinstance(value, dict | list) or not value:
        return new
    if isinstance(value, list):
        at = steps[0] % len(value)
        return [_put(item, steps[1:], new) if n == at else item for n, item in enumerate(value)]
    key = list(value)[steps[0] % len(value)]
    return {k: _put(item, steps[1:], new) if k == key else item for k, item in value.items()}


@pytest.mark.parametrize("name", DOCUMENTS)
@settings(max_examples=60)
@given(steps=st.lists(st.integers(0, 5), max_size=6), new=ANY)
def test_any_value_in_a_document_is_read_or_is_one_line(
    tmp_path_factory: pytest.TempPathFactory, name: str, steps: list[int], new: Any
) -> None:
    path = tmp_path_factory.getbasetemp() / f"{name}.json"
    path.write_text(json.dumps(_put(DOCUMENTS[name], steps, new)), "utf-8")
    with suppress(CalibrationError):  # any other error fails
        load_samples(path, samples=None, seed=0)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A small file of each kind that is read bit by bit."""
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path_factory.mktemp("whole")
    _members(folder / "a.tar", {"0.png": made.png(0), "0.txt": b"a", "1.json": b'{"text": "b"}'})
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"], "image": [made.png(0)] * 2}), folder / "a.parquet")
    (folder / "a.csv").write_text('text,label\n"a ""b""",1\nc,2\n')
    (folder / "a.jsonl").write_text('{"text": "a"}\n{"text": ["b"]}\n')
    (folder / "a.txt.gz").write_bytes(gzip.compress(b"some words"))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", ["a.tar", "a.parquet", "a.csv", "a.jsonl", "a.txt.gz"])
@settings(max_examples=80)
@given(flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=6), cut=st.integers(0, 10**6))
def test_flipped_bytes_are_read_or_are_one_line(
    whole: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory, name: str, flips: list[Any], cut: int
) -> None:
    data = bytearray(whole[name])
    for place, byte in flips:
        data[place % len(data)] = byte
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(data[: cut % (4 * len(data))])
    with suppress(CalibrationError):  # any other error fails
        load_samples(path, samples=None, seed=0)
