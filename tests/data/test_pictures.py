"""Pictures as data sets really hold them: deep grey, base64, large fields, other spellings, metadata anywhere."""

from __future__ import annotations

import base64
import csv
import io
import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ecoflap.data import load_samples
from ecoflap.data.images import ImageFinder, decode
from ecoflap.errors import CalibrationError


def colours(folder: Path) -> list[tuple[int, ...]]:
    samples = load_samples(folder, samples=None, seed=0).samples
    return sorted(tuple(image.getpixel((0, 0))) for sample in samples for image in sample.images)


def png(size: int, seed: int = 0) -> tuple[bytes, np.ndarray]:
    pixels = np.random.default_rng(seed).integers(0, 255, (size, size, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue(), pixels


@pytest.mark.parametrize(
    ("pixels", "top"),
    [
        (np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8), 65535),
        (np.arange(0, 65536, 1024, dtype=np.int32).reshape(8, 8), 65535),
        (np.arange(64, dtype=np.int32).reshape(8, 8), 255),
        (np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8), 1),
        (np.linspace(0, 255, 64, dtype=np.float32).reshape(8, 8), 255),
    ],
)
def test_deep_grey_is_scaled(pixels: np.ndarray, top: float) -> None:
    (found,) = decode(Image.fromarray(pixels), ImageFinder(None))
    wanted = pixels.astype(np.float64) / top * 255
    assert np.abs(np.asarray(found)[..., 1] - wanted).max() <= 0.5 + 1e-6


def test_a_range_of_its_own_goes_from_black_to_white() -> None:
    pixels = np.linspace(-1000, 3000, 64, dtype=np.float32).reshape(8, 8)  # Hounsfield units
    pixels[0, 1] = np.nan
    grey = np.asarray(decode(Image.fromarray(pixels), ImageFinder(None))[0])[..., 0]
    assert (grey[0, 0], grey[0, 1], grey[-1, -1]) == (0, 0, 255)


@pytest.mark.parametrize("size", [2, 6, 40])
@pytest.mark.parametrize("form", ["plain", "lines", "address", "unpadded", "data"])
def test_base64_of_any_length_and_dress(size: int, form: str) -> None:
    data, pixels = png(size)
    text = {
        "plain": base64.b64encode(data).decode(),
        "lines": base64.encodebytes(data).decode(),
        "address": base64.urlsafe_b64encode(data).decode(),
        "unpadded": base64.b64encode(data).decode().rstrip("="),
        "data": "data:image/png;base64," + base64.encodebytes(data).decode(),
    }[form]
    assert (np.asarray(decode(text, ImageFinder(None))[0]) == pixels).all()


def test_fields_of_a_table_may_be_large_and_the_modules_limit_stays(tmp_path: Path) -> None:
    data, pixels = png(256)
    with (tmp_path / "bench.tsv").open("w", newline="") as out:
        csv.writer(out, delimiter="\t").writerows(
            [["index", "image", "question", "answer"], [1, base64.b64encode(data).decode(), "what?", "noise"]]
        )
    before = csv.field_size_limit()
    (sample,) = load_samples(tmp_path / "bench.tsv", samples=None, seed=0).samples
    assert (np.asarray(sample.images[0]) == pixels).all()
    assert csv.field_size_limit() == before


@pytest.mark.parametrize("stored", ["NFC", "NFD"])
def test_names_in_another_unicode_form_or_from_windows(tmp_path: Path, stored: str) -> None:
    (tmp_path / "pictures").mkdir()
    file = tmp_path / "pictures" / unicodedata.normalize(stored, "café.png")
    Image.new("RGB", (4, 4), (9, 8, 7)).save(file)
    finder = ImageFinder(tmp_path)
    for form in ("NFC", "NFD"):
        name = unicodedata.normalize(form, "café.png")
        for written in (f"pictures/{name}", f"pictures\\{name}"):
            assert decode(written, finder)[0].getpixel((0, 0)) == (9, 8, 7)


@pytest.mark.parametrize("column", ["file_name", "image_file_name", "file_names", "images_file_names"])
def test_metadata_names_pictures_as_datasets_allows(tmp_path: Path, column: str) -> None:
    rows = []
    for number in range(3):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / f"{number}.png")
        names = [f"{number}.png", "0.png"]
        rows.append({column: names if column.endswith("s") else names[0], "text": "red"})
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    extra = [0, 0, 0] if column.endswith("s") else []
    assert colours(tmp_path) == sorted((number, 0, 0) for number in [0, 1, 2, *extra])


@pytest.mark.parametrize("split", ["", "train"])
def test_metadata_in_sub_folders_names_what_lies_beside_it(tmp_path: Path, split: str) -> None:
    for number, name in enumerate(("first", "second")):
        folder = tmp_path / split / name
        folder.mkdir(parents=True)
        Image.new("RGB", (4, 4), (number, 0, 0)).save(folder / "same.png")  # the same name in each
        (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "same.png", "text": f"caption {number}"}))
    found = load_samples(tmp_path, samples=None, seed=0).samples
    said = {sample.text: sample.images[0].getpixel((0, 0)) for sample in found}
    assert said == {"caption 0": (0, 0, 0), "caption 1": (1, 0, 0)}


@pytest.mark.parametrize("where", ["", "data"])
@pytest.mark.parametrize("names", [("train", "validation"), ("Train", "Validation")])
def test_metadata_in_folders_of_splits(where: str, names: tuple[str, str], tmp_path: Path) -> None:
    for number, name in enumerate(names):
        folder = tmp_path / where / name
        folder.mkdir(parents=True)
        Image.new("RGB", (4, 4), (number, 0, 0)).save(folder / "same.PNG")
        (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "same.PNG", "text": f"caption {number}"}))
    for split, caption in (("", "caption 0"), (":validation", "caption 1")):
        (sample,) = load_samples(f"{tmp_path}{split}", samples=None, seed=0).samples
        assert (sample.text, sample.images[0].getpixel((0, 0))) == (caption, (int(caption[-1]), 0, 0))
    with pytest.raises(CalibrationError, match="nosuch"):
        load_samples(f"{tmp_path}:nosuch", samples=None, seed=0)
