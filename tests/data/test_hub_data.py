"""Hub data sets: no hub here, so what `datasets` would stream is made from local samples, through its own classes."""

from pathlib import Path
from typing import Any

import datasets
import made
import pytest

from ecoflap.data import load_samples
from ecoflap.data.formats.hub import Address, HubStream
from ecoflap.errors import CalibrationError


def stream(split: str, count: int) -> Any:
    features = datasets.Features({
        "image": datasets.Image(),
        "question": datasets.Value("string"),
        "answer": datasets.Value("string"),
        "label": datasets.ClassLabel(names=["even", "odd"]),
    })  # fmt: skip
    columns = {
        "image": [{"bytes": made.png(i)} for i in range(count)],
        "question": [f"what is {i}" for i in range(count)],
        "answer": [f"{split} {i}" for i in range(count)],
        "label": [i % 2 for i in range(count)],
    }
    return datasets.Dataset.from_dict(columns, features=features).to_iterable_dataset()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A hub with owner/name (splits train, test), owner/text, and owner/several (configurations en and de)."""
    asked: list[dict[str, Any]] = []

    def load(identifier: str, **options: Any) -> Any:
        asked.append({"id": identifier, **options})
        config = options.get("name")
        if identifier == "owner/name" and config is None:
            return datasets.IterableDatasetDict({"train": stream("train", 10), "test": stream("test", 3)})
        if identifier in ("owner/several", "several") and config in ("en", "de"):
            return datasets.IterableDatasetDict({"train": stream(config, 4), "validation": stream(f"{config} val", 2)})
        if identifier == "owner/text":
            return datasets.IterableDatasetDict({"train": stream("train", 1).remove_columns("image")})
        raise ValueError("Config name is missing or unknown")

    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


def test_a_stream_is_drawn_with_the_seed(hub: list[dict[str, Any]]) -> None:
    drawn = load_samples("owner/name", samples=4, seed=1)
    assert hub == [{"id": "owner/name", "streaming": True}]
    assert drawn.indices == load_samples("owner/name", samples=4, seed=1).indices
    assert drawn.indices != load_samples("owner/name", samples=4, seed=2).indices
    assert drawn.classes == ("even", "odd")
    for index, sample in zip(drawn.indices, drawn.samples, strict=True):
        assert (sample.question, sample.text) == (f"what is {index}", f"train {index}")
        assert sample.label == ("even", "odd")[index % 2]
        assert made.shows(sample, index)


@pytest.mark.parametrize(
    ("source", "first"),
    [
        ("owner/name:test", "test 0"),
        ("owner/several:de", "de 0"),
        ("owner/several:de:validation", "de val 0"),
        ("owner/several/en:validation", "en val 0"),
        ("owner/several/en", "en 0"),
        ("several:en:train", "en 0"),
    ],
)
def test_splits_and_configurations(source: str, first: str, hub: list[dict[str, Any]]) -> None:
    assert load_samples(source, samples=None, seed=1).samples[0].text == first


def test_a_revision(hub: list[dict[str, Any]]) -> None:
    load_samples("owner/name@refs/convert/parquet:test", samples=1, seed=1)
    assert hub == [{"id": "owner/name", "streaming": True, "revision": "refs/convert/parquet"}]


def test_what_is_not_there(hub: list[dict[str, Any]]) -> None:
    with pytest.raises(CalibrationError, match="owner/name has no split 'val': it has train, test"):
        load_samples("owner/name:val", samples=1, seed=1)
    with pytest.raises(CalibrationError, match=r"'owner/several' is no local file.*ValueError.*its configuration"):
        load_samples("owner/several", samples=1, seed=1)
    with pytest.raises(CalibrationError, match="owner/several has no split 'dev': it has train, validation"):
        load_samples("owner/several:en:dev", samples=1, seed=1)


def test_addresses() -> None:
    assert Address.parse("a/b") == Address("a/b")
    assert Address.parse("a/b.c@v1.0:s") == Address("a/b.c", "v1.0", None, "s")
    assert Address.parse("a/b/c@main:s") == Address("a/b", "main", "c", "s")
    assert Address.parse("wikitext:wikitext-2-raw-v1:test") == Address("wikitext", None, "wikitext-2-raw-v1", "test")
    assert Address.parse("a/b:c:train[:10%]") is None
    for text in ("plain", "a//b", "/a/b", "a/b/c/d", "a/b:c:d:e", "a/b/c:d:e"):
        assert Address.parse(text) is None, text


@pytest.mark.parametrize("name", ["nosuch", "nosuch.jsonl", "data/nosuch.parquet"])
def test_a_mistyped_path_does_not_reach_the_hub(name: str, hub: list[dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=f"no file or folder '{name}'"):
        load_samples(name, samples=1, seed=0)
    (tmp_path / "data").mkdir()
    with pytest.raises(CalibrationError, match="no file or folder"):
        load_samples(tmp_path / "data" / "nosuch", samples=1, seed=0)
    assert hub == []


def test_pictures_are_shuffled_in_a_smaller_buffer(hub: list[dict[str, Any]]) -> None:
    """All rows of the buffer are downloaded before the first sample."""
    assert HubStream(Address("owner/name"), "owner/name").buffer < HubStream(Address("owner/text"), "owner/text").buffer
