"""Large sources are sampled without loading them whole: parquet, CSV, JSON, JSON lines, compressed, plain text."""

import bz2
import csv
import gzip
import io
import json
import lzma
import random
import tempfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import made
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecoflap.data import SampleReader, load_samples
from ecoflap.data.formats import text
from ecoflap.data.formats.csv import CsvTable
from ecoflap.data.formats.json import JsonDocument
from ecoflap.data.images import BrokenSample
from ecoflap.errors import CalibrationError

MIB = 1 << 20


@pytest.mark.parametrize("group", [1_000_000, 20_000])
def test_a_million_rows_of_parquet(group: int, tmp_path: Path) -> None:
    """Peak of Arrow's own memory and of Python's, against 70 MB that the text takes when it is decoded whole."""
    count = 1_000_000
    numbers = pa.array(range(count)).cast(pa.string())
    import pyarrow.compute as pc

    table = pa.table(
        {"question": pc.binary_join_element_wise(pa.scalar("question " + "x" * 50), numbers, " "), "answer": numbers}
    )
    whole = table.nbytes
    pq.write_table(table, tmp_path / "big.parquet", row_group_size=group, use_dictionary=False)
    del table, numbers
    pool = pa.default_memory_pool()
    pool.release_unused()
    before = pool.bytes_allocated()
    highest = 0
    tracemalloc.start()
    reader = SampleReader(tmp_path / "big.parquet", samples=16, seed=0)
    drawn = []
    for index, sample in reader:
        highest = max(highest, pool.bytes_allocated() - before)
        drawn.append((index, sample.text))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [text for _, text in drawn] == [str(index) for index, _ in drawn]
    assert max(index for index, _ in drawn) > count // 2
    assert highest < whole / 4
    assert peak < 40 * MIB  # 8 of them the permutation


def big_csv(path: Path, count: int) -> int:
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["question", "answer"])
        writer.writerows((f'line one\nof {n}, "quoted" ' + "x" * 200, str(n)) for n in range(count))
    return path.stat().st_size


def big_json(path: Path, count: int) -> int:
    made.write_json(
        path, [{"question": f'brackets ]}}{{[ \\" of {n} ' + "x" * 200, "answer": str(n)} for n in range(count)]
    )
    return path.stat().st_size


def big_lines(path: Path, count: int) -> int:
    made.write_lines(path, ({"question": f"of {n} " + "x" * 200, "answer": str(n)} for n in range(count)))
    return path.stat().st_size


@pytest.mark.parametrize(("name", "make"), [("a.csv", big_csv), ("a.json", big_json), ("a.jsonl", big_lines)])
def test_text_tables_keep_offsets_alone(name: str, make: Callable[[Path, int], int], tmp_path: Path) -> None:
    size = make(tmp_path / name, 20_000)
    tracemalloc.start()
    drawn = load_samples(tmp_path / name, samples=64, seed=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [sample.text for sample in drawn.samples] == [str(index) for index in drawn.indices]
    assert peak < size / 3


FIELD = st.text(alphabet="ab\",;\n\r\t é|'", max_size=8)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.lists(FIELD, min_size=2, max_size=2), max_size=8), st.sampled_from(["\n", "\r\n"]), st.booleans())
def test_csv_is_read_as_the_standard_library_reads_it(rows: list[list[str]], end: str, all_quoted: bool) -> None:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator=end, quoting=csv.QUOTE_ALL if all_quoted else csv.QUOTE_MINIMAL)
    if not all_quoted:  # Python leaves a lone carriage return bare, which readers disagree about
        rows = [[field.replace("\r", "") for field in row] for row in rows]
    writer.writerow(["first", "second"])
    writer.writerows(rows)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "a.csv"
        file.write_bytes(stream.getvalue().encode())
        with file.open(newline="", encoding="utf-8") as opened:
            expected = list(csv.DictReader(opened))
        table = CsvTable(file, "a.csv")
        order = list(range(len(table)))
        random.Random(0).shuffle(order)
        assert table.columns == ["first", "second"]
        assert list(table.take(order, [])) == [expected[index] for index in order]


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=120))
def test_any_bytes_are_a_csv_or_a_clear_line(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "a.csv"
        file.write_bytes(b"text,b\n" + data)
        try:
            table = CsvTable(file, "a.csv")
            rows = list(table.take(range(len(table)), []))
        except CalibrationError as error:
            assert str(error).startswith("a.csv is not a readable CSV file")  # noqa: PT017
            return
        assert all(isinstance(row, BrokenSample) or set(row) == {"text", "b"} for row in rows)


def test_csv_details(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbf text ;label\n\nhere;1\nthere;2;3\nshort\n")  # mark, blanks, ;
    table = CsvTable(tmp_path / "a.csv", "a.csv")
    assert table.columns == ["text", "label"]
    first, second, third = table.take(range(len(table)), [])
    assert (first, second) == ({"text": "here", "label": "1"}, {"text": "there", "label": "2"})
    assert isinstance(third, BrokenSample)
    assert str(third) == "it has 1 fields, the header 2"
    monkeypatch.setattr("ecoflap.data.formats.csv.LARGEST_FIELD", 1 << 17)
    (tmp_path / "b.csv").write_text('text,label\n"open' + "x\n" * 70_000)
    with pytest.raises(
        CalibrationError, match=r"b.csv is not a readable CSV file, after row 0.*is a quote not closed\?"
    ):
        CsvTable(tmp_path / "b.csv", "b.csv")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(alphabet='ab"\\{}[],:é', max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(alphabet='k"}]\\', max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)
OBJECT = st.dictionaries(st.text(alphabet='k"}]\\', max_size=3), JSON, max_size=4)


@settings(max_examples=80, deadline=None)
@given(st.lists(OBJECT, min_size=1, max_size=5), st.sampled_from([None, 1]), st.booleans())
def test_json_objects_are_found_as_the_parser_finds_them(
    rows: list[dict[str, Any]], indent: int | None, named: bool
) -> None:
    data = {"info": {"x": [{"no": 1}]}, "name": "[{", "rows": rows, "none": []} if named else rows
    with tempfile.TemporaryDirectory() as folder:
        file = made.write_json(Path(folder) / "a.json", data)
        file.write_text(json.dumps(data, indent=indent, ensure_ascii=False), encoding="utf-8")
        document = JsonDocument(file, "a.json")
        assert document.kind == ("object" if named else "list")
        assert list(document.lists) == ["rows" if named else ""]
        assert list(next(iter(document.lists.values()))) == rows
        if named:
            assert document.texts == {"name": "[{"}
            assert document.members.keys == ["info"]
            assert list(document.members) == [{"x": [{"no": 1}]}]


@pytest.mark.parametrize(
    "data", ['[{"a": 1}, 2]', '[1, {"a": 1}]', '[{"a": 1} 5 {"a": 2}]', "[[1], [2]]", "[]", "3", '"x"']
)
def test_json_that_is_no_list_of_objects(data: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(data)
    with pytest.raises(CalibrationError, match=r"a.json must hold a list of objects"):
        load_samples(tmp_path / "a.json", samples=1, seed=0)


def test_several_lists_are_ambiguous(tmp_path: Path) -> None:
    made.write_json(tmp_path / "a.json", {"one": [{"text": "a"}], "two": [{"text": "b"}]})
    with pytest.raises(CalibrationError, match=r"a.json holds several lists \(one, two\)"):
        load_samples(tmp_path / "a.json", samples=1, seed=0)


def test_a_broken_line_is_a_broken_sample(tmp_path: Path) -> None:
    lines = [json.dumps({"question": "q", "answer": str(n)}) for n in range(40)]
    lines[3] = lines[3][:-4]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    drawn = load_samples(tmp_path / "a.jsonl", samples=None, seed=0)
    assert (len(drawn.samples), drawn.skipped) == (39, 1)
    (tmp_path / "a.jsonl").write_text("\n".join(line[:-4] for line in lines))
    with pytest.raises(CalibrationError, match=r"a.jsonl: sample 0 is not valid JSON"):
        load_samples(tmp_path / "a.jsonl", samples=1, seed=0)


PACKED = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_compressed_lines_and_texts(suffix: str, tmp_path: Path) -> None:
    def pack(path: Path, data: bytes) -> Path:
        if suffix == ".zst":
            with pa.CompressedOutputStream(str(path), "zstd") as stream:
                stream.write(data)
        else:
            path.write_bytes(
                PACKED[suffix](data[: len(data) // 2]) + PACKED[suffix](data[len(data) // 2 :])
            )  # two parts
        return path

    lines = [{"text": f"page {n}", "timestamp": "2019-04-25T12:57:54Z", "url": "https://x"} for n in range(300)]
    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    file = pack(tmp_path / f"c4-train.00000-of-01024.json{suffix}", data)
    plain = made.write_lines(tmp_path / "plain.jsonl", lines)
    drawn, again = (load_samples(source, samples=300, seed=3) for source in (file, plain))
    assert drawn.indices == again.indices
    assert [sample.text for sample in drawn.samples] == [f"page {index}" for index in drawn.indices]
    assert load_samples(file, samples=None, seed=3).indices == tuple(range(300))
    story = pack(tmp_path / f"story.txt{suffix}", b"once upon a time")
    assert load_samples(story, samples=1, seed=0).samples[0].text == "once upon a time"
    story.write_bytes(story.read_bytes()[:-6])
    with pytest.raises(CalibrationError, match=r"story.txt\.\w+ cannot be decompressed"):
        load_samples(story, samples=1, seed=0)


def test_compressed_lines_are_read_twice_for_one_draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for the count, once for the rows: no random access, but no pass for each sample either."""
    lines = "".join(json.dumps({"text": f"page {n} " + "word " * 100}) + "\n" for n in range(2000))
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(lines.encode()))
    opened: list[Path] = []
    original = gzip.open

    def spy(file: Path) -> Any:
        opened.append(file)
        return original(file)

    monkeypatch.setattr(gzip, "open", spy)
    assert len(load_samples(tmp_path / "a.json.gz", samples=4, seed=0).samples) > 400
    assert len(opened) == 2


def test_much_text_is_read_in_seeded_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "READ_WHOLE", 20_000)
    monkeypatch.setattr(text, "PIECE", 1000)
    (tmp_path / "a.txt").write_text("".join(f"line {n} é\n" for n in range(4000)))
    (tmp_path / "b.txt").write_text("".join(f"other {n}\n" for n in range(40)))
    drawn = load_samples(tmp_path, samples=8, seed=0)
    assert len(drawn.samples) == 8 == drawn.windows
    assert drawn.indices == load_samples(tmp_path, samples=8, seed=0).indices
    assert drawn.indices != load_samples(tmp_path, samples=8, seed=1).indices
    whole = (tmp_path / "a.txt").read_text() + (tmp_path / "b.txt").read_text()
    for sample in drawn.samples:
        assert 900 < len((sample.text or "").encode()) <= 1000 or "other" in (sample.text or "")
        assert set((sample.text or "").splitlines()) <= set(whole.splitlines())  # whole lines
    everything = load_samples(tmp_path, samples=None, seed=0)
    assert "".join(sample.text or "" for sample in everything.samples) == whole


def test_texts_in_sub_folders(tmp_path: Path) -> None:
    for name in ("b/2.txt", "a/1.raw"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(name)
    assert [sample.text for sample in load_samples(tmp_path, samples=1, seed=0).samples] == ["a/1.raw", "b/2.txt"]


def test_files_of_one_format_are_one_table(tmp_path: Path) -> None:
    for k in range(3):
        made.write_lines(tmp_path / f"{k}.jsonl", [{"question": "q", "answer": f"{k}{n}"} for n in range(4)])
    drawn = load_samples(tmp_path, samples=None, seed=0)
    assert [sample.text for sample in drawn.samples] == [f"{k}{n}" for k in range(3) for n in range(4)]
    some = load_samples(tmp_path, samples=5, seed=0)
    assert [sample.text for sample in some.samples] == [f"{index // 4}{index % 4}" for index in some.indices]


def test_a_repository_of_parquet_files_has_splits(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / "data").mkdir(exist_ok=True)
        for k in range(2):
            table = pa.table({"question": ["q"], "answer": [f"{split} {k}"]})
            pq.write_table(table, tmp_path / "data" / f"{split}-0000{k}-of-00002.parquet")
    texts = {s: [x.text for x in load_samples(f"{tmp_path}{s}", samples=None, seed=0).samples] for s in ("", ":test")}
    assert texts == {"": ["train 0", "train 1"], ":test": ["test 0", "test 1"]}
    with pytest.raises(CalibrationError, match="no file is named after the split 'val'"):
        load_samples(f"{tmp_path}:val", samples=1, seed=0)
