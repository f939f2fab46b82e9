import csv
import io
import json
from pathlib import Path
from typing import Any

import datasets
import pico
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ecoflap.data import SampleReader, load_samples
from ecoflap.errors import CalibrationError, EcoflapError, UnknownName


def png(number: int) -> bytes:
    stream = io.BytesIO()
    pico.picture(number).save(stream, "PNG")
    return stream.getvalue()


def rows(n: int) -> list[dict[str, Any]]:
    return [{"question": f"what is {i}", "answer": f"answer {i}", "kind": "ab"[i % 2]} for i in range(n)]


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def with_images(folder: Path, n: int) -> list[dict[str, Any]]:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        (folder / f"{i}.png").write_bytes(png(i))
    return [{"image": f"{i}.png", **row} for i, row in enumerate(rows(n))]


def make(form: str, folder: Path) -> Path:
    """Ten samples with images in the given format."""
    records = with_images(folder, 10)
    target = folder / f"data.{form}"
    if form == "jsonl":
        write_jsonl(target, records)
    elif form == "json":
        target.write_text(json.dumps({"info": "x", "annotations": records}))
    elif form in ("csv", "tsv"):
        with target.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(records[0]), delimiter="\t" if form == "tsv" else ",")
            writer.writeheader()
            writer.writerows(records)
    elif form == "imagefolder":
        write_jsonl(
            folder / "metadata.jsonl",
            [{"file_name": r["image"], **{k: r[k] for k in r if k != "image"}} for r in records],
        )
        return folder
    else:
        embedded = {key: [r[key] for r in records] for key in records[0]} | {
            "image": [{"bytes": png(i)} for i in range(10)]
        }
        dataset = datasets.Dataset.from_dict(embedded).cast_column("image", datasets.Image())
        if form == "parquet":
            dataset.to_parquet(str(target))
        elif form == "parquet-groups":  # several row groups in several files
            target = folder / "shards"
            target.mkdir()
            table = pa.table({**embedded, "image": embedded["image"]})
            pq.write_table(table.slice(0, 7), target / "0.parquet", row_group_size=3)
            pq.write_table(table.slice(7), target / "1.parquet", row_group_size=2)
        elif form == "saved":
            target = folder / "saved"
            dataset.save_to_disk(str(target))
        elif form == "saved-dict":
            target = folder / "saved"
            datasets.DatasetDict({"train": dataset, "test": dataset.select([0])}).save_to_disk(str(target))
    return target


FORMS = ["jsonl", "json", "csv", "tsv", "imagefolder", "parquet", "parquet-groups", "saved", "saved-dict"]


@pytest.mark.parametrize("form", FORMS)
def test_every_format_gives_the_same_samples(form: str, tmp_path: Path) -> None:
    drawn = load_samples(make(form, tmp_path / "d"), samples=4, seed=3)
    again = load_samples(make("jsonl", tmp_path / "e"), samples=4, seed=3)
    assert drawn.indices == again.indices
    assert len(set(drawn.indices)) == 4
    assert drawn.columns["question"] == "question"
    assert drawn.columns["text"] == "answer"
    for index, sample in zip(drawn.indices, drawn.samples, strict=True):
        assert sample.prompt == f"Question: what is {index} Short answer:"
        assert sample.question == f"what is {index}"
        assert (sample.text, sample.kind) == (f"answer {index}", "ab"[index % 2])
        assert sample.image is not None
        assert sample.image.mode == "RGB"
        assert sample.image.tobytes() == pico.picture(index).tobytes()


def test_seed_draws_a_permutation_and_all_is_in_order(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", rows(30))
    first, same, other = (load_samples(file, samples=10, seed=s) for s in (0, 0, 1))
    assert first == same
    assert first.indices != other.indices
    assert sorted(load_samples(file, samples=30, seed=5).indices) == list(range(30))
    assert load_samples(file, samples=None, seed=5).indices == tuple(range(30))


@pytest.mark.parametrize(
    ("record", "roles"),
    [
        ({"img": "x", "caption": "c"}, {"image": "img", "text": "caption"}),
        (
            {"Image_Path": "x", "Question": "q", "Answer": "a"},
            {"image": "Image_Path", "question": "Question", "text": "Answer"},
        ),
        ({"instruction": "i", "response": "r"}, {"prompt": "instruction", "text": "response"}),
        ({"image": "x", "label": 3}, {"image": "image", "label": "label"}),
        ({"text": "context", "question": "q", "answer": "a"}, {"question": "question", "text": "answer"}),
        (
            {"question": "q", "answers": ["a"], "question_type": "t"},
            {"question": "question", "answers": "answers", "kind": "question_type"},
        ),
        ({"text": "plain"}, {"text": "text"}),
        ({"images": ["x"], "messages": [{}], "text": "t"}, {"messages": "messages", "image": "images"}),
        (
            {"image": "x", "caption": "c", "category": "k", "image_id": 1, "type": "t"},
            {"image": "image", "text": "caption", "label": "category", "kind": "type", "group": "image_id"},
        ),
        ({"question": "q", "label": 1, "subject": "s"}, {"question": "question", "text": "label", "kind": "subject"}),
        ({"input": "i", "context": "c", "output": "o"}, {"prompt": "input", "context": "context", "text": "output"}),
        ({"context": "c", "text": "t"}, {"text": "text"}),
    ],
)
def test_columns_are_guessed(record: dict[str, Any], roles: dict[str, str], tmp_path: Path) -> None:
    reader = SampleReader(write_jsonl(tmp_path / "a.jsonl", [record]), samples=1, seed=0)
    assert reader.columns == roles


def test_columns_can_be_chosen(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"q1": "old", "q2": "new", "a": "yes", "image": "no file"}])
    drawn = load_samples(file, samples=1, seed=0, columns={"question": "q2", "answer": "a", "image": ""})
    assert (drawn.samples[0].question, drawn.samples[0].text, drawn.samples[0].image) == ("new", "yes", None)
    with pytest.raises(UnknownName, match="did you mean 'question'"):
        load_samples(file, samples=1, seed=0, columns={"questoin": "q2"})
    with pytest.raises(CalibrationError, match=r"no column 'q3'.*q1, q2"):
        load_samples(file, samples=1, seed=0, columns={"question": "q3"})


@pytest.mark.parametrize("form", ["saved", "parquet"])
def test_class_numbers_get_their_names(form: str, tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    columns = {"image": [{"bytes": png(i)} for i in range(40)], "label": [i % 2 for i in range(39)] + [-1]}
    dataset = datasets.Dataset.from_dict(columns, features=features)
    target = tmp_path / ("data.parquet" if form == "parquet" else "data")
    dataset.to_parquet(str(target)) if form == "parquet" else dataset.save_to_disk(str(target))
    drawn = load_samples(target, samples=None, seed=0)
    assert drawn.classes == ("cat", "dog")
    assert [sample.label for sample in drawn.samples] == [("cat", "dog")[i % 2] for i in range(39)]
    assert drawn.samples[1].text == "dog"
    assert drawn.skipped == 1  # -1 is how a test set keeps its classes secret


def test_lists_of_images_stay_encoded_until_drawn(tmp_path: Path) -> None:
    features = datasets.Features({"images": [datasets.Image()], "question": datasets.Value("string")})
    rows = {"images": [[{"bytes": png(1)}, {"bytes": png(2)}]], "question": ["q"]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "d"))
    sample = load_samples(tmp_path / "d", samples=1, seed=0).samples[0]
    assert [image.tobytes() for image in sample.images] == [pico.picture(n).tobytes() for n in (1, 2)]


def test_summary_names_the_columns(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"question": "q", "answer": ""}, *rows(30)])
    drawn = load_samples(file, samples=None, seed=0)
    assert drawn.summary == f"30 samples of {file}: question=question, text=answer, kind=kind; 1 broken skipped"
    reader = SampleReader(file, samples=1, seed=0, columns={"kind": ""})
    assert reader.summary == f"{file}: question=question, text=answer"
    (tmp_path / "a.txt").write_text("what shape", "utf-8")
    for count, said in ((5, "5"), (None, "all")):
        text = load_samples(tmp_path / "a.txt", samples=count, seed=0)
        assert text.summary == f"{said} windows of the text of {tmp_path / 'a.txt'}"


def test_prompts(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "Say hi.", "response": "hi"}])
    assert load_samples(file, samples=1, seed=0).samples[0].prompt == "Say hi."
    assert load_samples(file, samples=1, seed=0, prompt_template="{question} ->").samples[0].prompt == "Say hi. ->"
    for template in ("no field", "{question} {other}", "{"):
        with pytest.raises(CalibrationError, match="prompt template"):
            load_samples(file, samples=1, seed=0, prompt_template=template)


def test_annotators_answers(tmp_path: Path) -> None:
    answers = [{"answer": a, "answer_id": i} for i, a in enumerate(["red", "blue", "blue"])]
    file = write_jsonl(tmp_path / "a.jsonl", [{"question": "q", "answers": answers}])
    sample = load_samples(file, samples=1, seed=0).samples[0]
    assert sample.answers == ("red", "blue", "blue")
    assert sample.text == "blue"  # what most said is the target of calibration


def test_broken_samples_are_skipped_and_replaced(tmp_path: Path) -> None:
    records = with_images(tmp_path, 60)
    (tmp_path / "7.png").write_bytes(png(7)[:60])
    (tmp_path / "9.png").unlink()
    file = write_jsonl(tmp_path / "a.jsonl", records)
    drawn = load_samples(file, samples=58, seed=0)
    assert len(drawn.samples) == 58
    assert not {7, 9} & set(drawn.indices)
    assert drawn.skipped == 2 == load_samples(file, samples=None, seed=0).skipped


@pytest.mark.parametrize("break_it", ["image", "text", "network"])
def test_many_broken_samples_stop(break_it: str, tmp_path: Path) -> None:
    records = with_images(tmp_path, 40)
    for i in range(0, 40, 10):
        if break_it == "image":
            (tmp_path / f"{i}.png").write_bytes(b"not a picture")
        elif break_it == "text":
            records[i]["answer"] = " "
        else:
            records[i]["image"] = "https://example.org/cat.png"
    file = write_jsonl(tmp_path / "a.jsonl", records)
    reason = {"image": "unreadable image", "text": "column 'answer' is empty", "network": "not fetched"}[break_it]
    for samples in (None, 36):
        with pytest.raises(CalibrationError, match=rf"5%.*row \d+: .*{reason}|broken \(row 0: .*{reason}"):
            load_samples(file, samples=samples, seed=0)


def test_many_missing_documents_stop(tmp_path: Path) -> None:
    records = [{"text": None if i % 10 == 0 else f"doc {i}"} for i in range(40)]
    with pytest.raises(CalibrationError, match=r"4 of 40 samples are broken \(row \d+: column 'text' is empty"):
        load_samples(write_jsonl(tmp_path / "a.jsonl", records), samples=3, seed=0)
    del records[10:]
    records += [{"text": "doc"}] * 30
    assert load_samples(write_jsonl(tmp_path / "a.jsonl", records), samples=3, seed=0).skipped == 1


def test_text_files_are_one_corpus(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    whole = load_samples(tmp_path, samples=3, seed=0)
    assert [s.text for s in whole.samples] == ["first", "second"]
    assert whole.windows == 3
    one = load_samples(tmp_path / "a.txt", samples=None, seed=0)
    assert [s.text for s in one.samples] == ["first"]
    assert one.windows == -1
    table = load_samples(write_jsonl(tmp_path / "c.jsonl", [{"text": f"doc {i}"} for i in range(5)]), samples=9, seed=0)
    assert len(table.samples) == 5
    assert table.windows == 9


def _error_cases(folder: Path) -> dict[str, tuple[Path, str]]:
    (folder / "empty.jsonl").write_text("")
    (folder / "blank.jsonl").write_text("\n\n")
    (folder / "blank.txt").write_text(" \n")
    (folder / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (folder / "bad.jsonl").write_text('{"text": ')
    (folder / "list.jsonl").write_text("[1]\n")
    (folder / "bad.json").write_text("{")
    (folder / "scalar.json").write_text("3")
    (folder / "bad.parquet").write_bytes(b"PAR1 nonsense")
    (folder / "data.xyz").write_text("x")
    (folder / "nothing").mkdir()
    write_jsonl(folder / "strange.jsonl", [{"foo": 1, "bar": 2}])
    return {
        "missing": (folder / "nosuch.parquet", "no file or folder"),
        "empty": (folder / "empty.jsonl", "is empty"),
        "blank": (folder / "blank.jsonl", "is empty"),
        "blank text": (folder / "blank.txt", "is empty"),
        "encoding": (folder / "latin.txt", "not UTF-8"),
        "broken line": (folder / "bad.jsonl", "not valid JSON"),
        "no object": (folder / "list.jsonl", "not a JSON object"),
        "broken json": (folder / "bad.json", "not valid JSON"),
        "no list": (folder / "scalar.json", "list of objects"),
        "broken parquet": (folder / "bad.parquet", "not a readable parquet"),
        "format": (folder / "data.xyz", "unknown format '.xyz'"),
        "empty folder": (folder / "nothing", "holds no known data"),
        "columns": (folder / "strange.jsonl", "none of its columns .foo, bar."),
    }


def test_errors_are_one_clear_line(tmp_path: Path) -> None:
    for name, (path, message) in _error_cases(tmp_path).items():
        with pytest.raises(EcoflapError, match=message) as caught:
            load_samples(path, samples=1, seed=0)
        line = str(caught.value)
        assert "\n" not in line, name
        assert path.name in line, name


def test_too_few_samples_are_all_taken(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", rows(5))
    with pytest.warns(UserWarning, match=r"a.jsonl holds 5 usable samples, 6 were asked for: all of them are taken"):
        assert sorted(load_samples(file, samples=6, seed=0).indices) == [0, 1, 2, 3, 4]
    with pytest.raises(CalibrationError, match="at least 1"):
        load_samples(file, samples=0, seed=0)


def test_parquet_reads_wanted_row_groups_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = pa.table({"question": [f"q{i}" for i in range(1000)], "answer": ["a"] * 1000, "heavy": ["x" * 100] * 1000})
    pq.write_table(table, tmp_path / "big.parquet", row_group_size=10)
    read: list[tuple[list[int], list[str]]] = []
    original = pq.ParquetFile.iter_batches

    def spy(self: Any, batch_size: int, row_groups: list[int], columns: list[str]) -> Any:
        read.append((row_groups, columns))
        return original(self, batch_size=batch_size, row_groups=row_groups, columns=columns)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", spy)
    drawn = load_samples(tmp_path / "big.parquet", samples=20, seed=0)
    assert [s.question for s in drawn.samples] == [f"q{i}" for i in drawn.indices]
    assert [groups for groups, _ in read] == [[g] for g in sorted({index // 10 for index in drawn.indices})]  # once
    assert all(columns == ["question", "answer"] for _, columns in read)
