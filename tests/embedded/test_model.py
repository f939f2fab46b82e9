"""The shipped model and data: loads with plain transformers, sees the picture, answers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from embedded_vlm.questions import CAPTION_PROMPT, PROMPT
from embedded_vlm.score import Row, accuracy_by_kind, answers, commonest_answers, read_rows
from transformers import AutoModelForImageTextToText, AutoProcessor, Blip2ForConditionalGeneration

from ecoflap.support import embedded


@pytest.fixture(scope="module")
def processor() -> Any:
    return AutoProcessor.from_pretrained(embedded.model_path())


@pytest.fixture(scope="module")
def model() -> Any:
    torch.set_num_threads(1)
    return AutoModelForImageTextToText.from_pretrained(embedded.model_path()).eval()


@pytest.fixture(scope="module")
def test_rows() -> list[Row]:
    return read_rows(embedded.test_path())


def batch_of(rows: list[Row], processor: Any) -> dict[str, torch.Tensor]:
    prompts = [PROMPT.format(question=row["question"]) for row in rows]
    batch = processor(images=[row["image"] for row in rows], text=prompts, padding=True, return_tensors="pt")
    labels = processor.tokenizer([row["answer"] for row in rows], padding=True, return_tensors="pt")["input_ids"]
    return {**batch, "labels": labels.masked_fill(labels == processor.tokenizer.pad_token_id, -100)}


def test_importing_the_paths_loads_nothing_heavy() -> None:
    code = (
        "import sys, ecoflap.support.embedded as d; assert d.model_path().is_dir() and d.test_path().is_file(); "
        "assert not {'numpy', 'PIL', 'pyarrow', 'datasets', 'transformers'} & set(sys.modules)"
    )
    package = Path(embedded.__file__).parents[2]
    # The package's own __init__ is not ours to judge here: stand in for it with a bare one.
    bare = f"import sys, types; m = types.ModuleType('ecoflap'); m.__path__ = [{str(package)!r}]; "
    bare += "sys.modules['ecoflap'] = m; "
    subprocess.run([sys.executable, "-c", bare + code], check=True)


def test_assets_fit_in_the_package() -> None:
    files = [path for path in embedded.model_path().parent.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 20e6
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".pkl")]


def test_bundled_data(test_rows: list[Row]) -> None:
    calibration = read_rows(embedded.calibration_path())
    assert len(calibration) == 256
    assert len(test_rows) == 1530
    kinds = {row["kind"] for row in test_rows}
    assert len([kind for kind in kinds if kind.startswith("scenes/")]) == 6
    assert {"easy-vqa/color", "easy-vqa/shape", "easy-vqa/yes-no"} <= kinds
    for row in calibration + test_rows:
        assert row["image"].size == (64, 64)
        assert row["question"]
        assert row["answer"]
    assert any(row["question"] == CAPTION_PROMPT for row in calibration)
    pictures = {row["image"].tobytes() for row in calibration}
    assert not pictures & {row["image"].tobytes() for row in test_rows}


def test_data_opens_with_datasets() -> None:
    import datasets

    data = datasets.Dataset.from_parquet(str(embedded.calibration_path()), keep_in_memory=True)
    assert data.column_names == ["image", "question", "answer", "kind"]
    assert isinstance(data.features["image"], datasets.Image)
    assert data[0]["image"].size == (64, 64)


def test_every_word_of_the_data_is_known(processor: Any, test_rows: list[Row]) -> None:
    unknown = processor.tokenizer.unk_token_id
    for row in test_rows + read_rows(embedded.calibration_path()):
        for text in (PROMPT.format(question=row["question"]), row["answer"]):
            assert unknown not in processor.tokenizer(text)["input_ids"], text


def test_one_placeholder_a_query(model: Any, processor: Any, test_rows: list[Row], tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    for loaded in (processor, AutoProcessor.from_pretrained(tmp_path)):
        batch = batch_of(test_rows[:3], loaded)
        placeholders = (batch["input_ids"] == model.config.image_token_index).sum(dim=1)
        assert placeholders.tolist() == [model.config.num_query_tokens] * 3
        side = model.config.vision_config.image_size
        assert batch["pixel_values"].shape == (3, 3, side, side)


def test_model_class_and_generation_settings(model: Any) -> None:
    assert isinstance(model, Blip2ForConditionalGeneration)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.generation_config.max_new_tokens == 32
    assert not model.generation_config.do_sample


def test_loss_reacts_to_the_picture(model: Any, processor: Any, test_rows: list[Row]) -> None:
    rows = [row for row in test_rows if row["kind"] in ("scenes/attribute", "easy-vqa/color")][:16]
    batch = batch_of(rows, processor)
    with torch.no_grad():
        seen = model(**batch).loss
        other = model(**{**batch, "pixel_values": batch["pixel_values"].roll(1, dims=0)}).loss
    assert other > seen + 1.0


def test_answers_bundled_questions(model: Any, processor: Any, test_rows: list[Row]) -> None:
    rows = test_rows[:96]
    found = accuracy_by_kind(rows, answers(model, processor, rows))
    blind = accuracy_by_kind(rows, answers(model, processor, rows, blank=True))
    assert found["all"][0] >= 0.85
    assert found["easy-vqa"][0] >= 0.9
    assert found["scenes"][0] >= blind["scenes"][0] + 0.2


def test_caption(model: Any, processor: Any) -> None:
    rows = [row for row in read_rows(embedded.calibration_path()) if row["kind"] == "scenes/caption"]
    found = accuracy_by_kind(rows, answers(model, processor, rows))
    assert found["all"][0] >= 0.6


def test_scores_count_by_kind_and_group() -> None:
    rows = [
        {"question": "a?", "answer": "yes", "kind": "x/one"},
        {"question": "b?", "answer": "no", "kind": "x/two"},
        {"question": "c?", "answer": "no", "kind": "y/one"},
    ]
    found = accuracy_by_kind(rows, ["yes", "yes", "no"])
    assert found["x"] == (0.5, 2)
    assert found["y/one"] == (1.0, 1)
    assert found["all"] == (2 / 3, 3)
    training = [("a?", "no"), ("a?", "no"), ("a?", "yes"), ("b?", "yes")]
    assert commonest_answers(training, rows) == ["no", "yes", "no"]
