from pathlib import Path
from typing import Any

import pairs
import pico
import pytest
import torch
from picos import scramble
from tasks import run_task

from ecoflap.errors import CalibrationError, InvalidOption
from ecoflap.evaluation.nlvr2 import TEMPLATE

ROWS = 8
TEXTS = pairs.texts(ROWS, seed=3)


def nlvr2_file(folder: Path, labels: list[str] | None = None) -> Path:
    """The published format: one JSON object a line, pictures beside it by their names."""
    labels = labels or ["True", "False"] * (ROWS // 2)
    (folder / "dev").mkdir(exist_ok=True)
    rows = []
    for i, (text, label) in enumerate(zip(TEXTS, labels, strict=True)):
        for side in (0, 1):
            pico.picture(2 * i + side).save(folder / "dev" / f"dev-{i}-0-img{side}.png")
        rows.append({"identifier": f"dev-{i}-0-0", "sentence": text, "label": label})
    return pairs.write_rows(folder, rows, "dev.json")


def run(model: Any, processor: Any, data: Path, **options: Any) -> Any:
    return run_task("nlvr2", model, processor, data=data, **{"samples": None, "batch_size": 3, **options})


def check(result: Any, true: list[bool]) -> None:
    truth = [i % 2 == 0 for i in range(ROWS)]
    hits = [float(a == b) for a, b in zip(true, truth, strict=True)]
    assert [r["prediction"] for r in result.predictions] == [str(t).lower() for t in true]
    assert [r["truth"] for r in result.predictions] == [str(t).lower() for t in truth]
    p = sum(hits) / ROWS
    assert (result.value, result.stderr) == pytest.approx((p, (p * (1 - p) / (ROWS - 1)) ** 0.5))
    assert (result.metric, result.n) == ("accuracy", ROWS)
    assert [r["question"] for r in result.predictions] == TEXTS


def test_a_classifier_decides_as_in_single_forwards(tmp_path: Path) -> None:
    model, processor = pairs.vilt(11)
    result = run(model, processor, nlvr2_file(tmp_path))
    true = []
    for i, text in enumerate(TEXTS):
        torch.manual_seed(i)  # ViLT shuffles its patches, and reads them by their positions
        encoded = dict(processor([pico.picture(2 * i), pico.picture(2 * i + 1)], text, return_tensors="pt"))
        for name in ("pixel_values", "pixel_mask"):
            encoded[name] = encoded[name][None]
        with torch.no_grad():
            logits = model(**encoded).logits[0]
        true.append(bool(logits[1] > logits[0]))
    check(result, true)
    assert result.settings["answers"] == "classifier"
    assert len(set(true)) == 2


def test_classes_in_another_order(tmp_path: Path) -> None:
    model, processor = pairs.vilt()
    data = nlvr2_file(tmp_path)
    wanted = [r["prediction"] for r in run(model, processor, data).predictions]
    model.config.label2id, model.config.id2label = {"True": 0, "False": 1}, {0: "True", 1: "False"}
    other = [r["prediction"] for r in run(model, processor, data).predictions]
    assert other == [{"true": "false", "false": "true"}[said] for said in wanted]


@torch.no_grad()
def test_a_generating_model_decides_by_the_likelier_answer(tmp_path: Path) -> None:
    model, processor = pico.llava(chat=False)
    processor.tokenizer.add_tokens(["False", "True"])
    model.resize_token_embeddings(len(processor.tokenizer), mean_resizing=False)
    scramble(model, 6)  # a seed with which it says both
    template = "is the {question} there"
    result = run(model, processor, nlvr2_file(tmp_path), prompt_template=template)
    true = []
    for i, text in enumerate(TEXTS):
        scores = {}
        for answer in (False, True):
            prompt = f"<image><image>\n{template.format(question=text)}"
            inputs = dict(
                processor(
                    images=[pico.picture(2 * i), pico.picture(2 * i + 1)], text=[f"{prompt} {answer}</s>"],
                    return_tensors="pt",
                )
            )  # fmt: skip
            logs = model(**inputs).logits[0].log_softmax(-1)
            ids = inputs["input_ids"][0]
            scores[answer] = sum(float(logs[place - 1, ids[place]]) for place in (len(ids) - 2, len(ids) - 1))
        true.append(scores[True] > scores[False])
    check(result, true)
    assert len(set(true)) == 2
    assert (result.settings["answers"], result.settings["prompt_template"]) == ("log-likelihood", template)
    assert run(model, processor, nlvr2_file(tmp_path)).settings["prompt_template"] == TEMPLATE


def test_what_cannot_be_evaluated(tmp_path: Path) -> None:
    model, processor = pairs.vilt()
    with pytest.raises(CalibrationError, match="'maybe' in row 0 is neither true nor false"):
        run(model, processor, nlvr2_file(tmp_path, ["maybe"] * ROWS))
    with pytest.raises(InvalidOption, match=r"two images.*not CLIPModel"):
        run(*pico.clip(), nlvr2_file(tmp_path))
    rows = [{"image": pairs.picture_file(tmp_path, 0), "question": "red", "label": "true"}]
    with pytest.raises(CalibrationError, match="row 0 has 1 images"):
        run(model, processor, pairs.write_rows(tmp_path, rows))
