from pathlib import Path
from typing import Any

import pairs
import pico
import pytest
import torch
from picos import scramble
from tasks import run_task

from ecoflap.errors import CalibrationError, InvalidOption, NonFiniteLoss, UnknownName
from ecoflap.evaluation.retrieval import ranks

PICTURES, CAPTIONS = 8, 2


def clip() -> tuple[Any, Any]:
    model, processor = pico.clip()
    return scramble(model), processor


MODELS = {"clip": clip, "siglip": pairs.siglip, "blip": lambda: pairs.blip("retrieval"), "blip2": pairs.blip2_retrieval}


def said(picture: int) -> list[str]:
    return pairs.texts(PICTURES * CAPTIONS)[CAPTIONS * picture : CAPTIONS * (picture + 1)]


def captions_file(folder: Path) -> Path:
    rows = [{"image": pairs.picture_file(folder, i), "captions": said(i)} for i in range(PICTURES)]
    return pairs.write_rows(folder, rows)


def run(model: Any, processor: Any, data: Path, **options: Any) -> Any:
    return run_task("retrieval", model, processor, data=data, **{"samples": None, "batch_size": 5, **options})


@torch.no_grad()
def cosine_of_one_pair(name: str, model: Any, processor: Any, picture: int, text: str) -> float:
    """The model's own score of one picture and one text, by its whole forward."""
    padding = {"padding": "max_length", "max_length": 16} if name == "siglip" else {}
    inputs = processor(images=[pico.picture(picture)], text=[text], return_tensors="pt", **padding)
    if name == "blip":
        return float(model(**inputs, use_itm_head=False).itm_score)
    if name == "blip2":
        return float(model(**inputs, use_image_text_matching_head=False).logits_per_image)
    output = model(**inputs)
    return float((output.image_embeds * output.text_embeds).sum())  # both have length 1


@torch.no_grad()
def matching_of_one_pair(name: str, model: Any, processor: Any, picture: int, text: str) -> float:
    inputs = processor(images=[pico.picture(picture)], text=[text], return_tensors="pt")
    if name == "blip":
        return float(model(**inputs, use_itm_head=True).itm_score[0, 1])
    return float(model(**inputs, use_image_text_matching_head=True).logits_per_image[0, 1])


def recalls_by_sorting(scores: torch.Tensor, owners: list[int]) -> dict[str, list[float]]:
    """Hits of each query by sorting lists, ``scores`` ``[pictures, texts]``."""
    hits: dict[str, list[float]] = {}
    for depth in (1, 5, 10):
        hits[f"TR@{depth}"] = [
            float(any(owners[t] == p for t in sorted(range(len(owners)), key=lambda t: -row[t])[:depth]))
            for p, row in enumerate(scores.tolist())
        ]
        hits[f"IR@{depth}"] = [
            float(owners[t] in sorted(range(len(column)), key=lambda p: -column[p])[:depth])
            for t, column in enumerate(scores.t().tolist())
        ]
    return hits


def measured(result: Any) -> dict[str, tuple[float, float]]:
    return {"TR@1": (result.value, result.stderr)} | {k: (v.value, v.stderr) for k, v in result.others.items()}


def expected(hits: dict[str, list[float]]) -> dict[str, Any]:
    shares = {name: sum(of_all) / len(of_all) for name, of_all in hits.items()}
    return {k: pytest.approx((p, (p * (1 - p) / (len(hits[k]) - 1)) ** 0.5)) for k, p in shares.items()}


@pytest.mark.parametrize("name", MODELS)
def test_recalls_equal_those_of_single_forwards_and_sorting(name: str, tmp_path: Path) -> None:
    model, processor = MODELS[name]()
    model.train()
    result = run(model, processor, captions_file(tmp_path))
    assert model.training
    model.eval()
    owners = [i for i in range(PICTURES) for _ in range(CAPTIONS)]
    texts = [text for i in range(PICTURES) for text in said(i)]
    scores = torch.tensor([[cosine_of_one_pair(name, model, processor, p, t) for t in texts] for p in range(PICTURES)])
    hits = recalls_by_sorting(scores, owners)
    assert measured(result) == expected(hits)
    assert (result.metric, result.n, result.settings["captions"]) == ("TR@1", PICTURES, len(texts))
    assert [r["score"] for r in result.predictions] == hits["TR@1"]
    assert [r["prediction"] for r in result.predictions] == [texts[int(row.argmax())] for row in scores]
    assert [r["truth"] for r in result.predictions] == [said(i) for i in range(PICTURES)]
    assert 0 < result.others["TR@10"].value < 1 or 0 < result.others["IR@5"].value < 1


@pytest.mark.parametrize("name", ["blip", "blip2"])
def test_reranking_equals_matching_each_pair_alone(name: str, tmp_path: Path) -> None:
    model, processor = MODELS[name]()
    depth = 5
    result = run(model, processor, captions_file(tmp_path), rerank=depth)
    owners = [i for i in range(PICTURES) for _ in range(CAPTIONS)]
    texts = [text for i in range(PICTURES) for text in said(i)]
    cosines = torch.tensor([[cosine_of_one_pair(name, model, processor, p, t) for t in texts] for p in range(PICTURES)])
    both = cosines + torch.tensor(
        [[matching_of_one_pair(name, model, processor, p, t) for t in texts] for p in range(PICTURES)]
    )

    def sorted_anew(direction: int) -> torch.Tensor:
        top = cosines.topk(depth, dim=direction).indices
        kept = torch.zeros_like(cosines).scatter(direction, top, 1.0).bool()
        return torch.where(kept, both + 1000, cosines)  # above all others

    hits = {
        metric: of_all
        for direction, way in ((1, "TR"), (0, "IR"))
        for metric, of_all in recalls_by_sorting(sorted_anew(direction), owners).items()
        if metric.startswith(way)
    }
    assert measured(result) == expected(hits)
    assert hits != recalls_by_sorting(cosines, owners)


def test_rows_of_one_picture_are_one_candidate(tmp_path: Path) -> None:
    model, processor = clip()
    names = [pairs.picture_file(tmp_path, i) for i in range(PICTURES)]
    rows = [{"image": names[i], "caption": said(i)[k], "image_id": i} for k in range(CAPTIONS) for i in range(PICTURES)]
    apart = run(model, processor, pairs.write_rows(tmp_path, rows, "apart.jsonl"), batch_size=7)
    assert measured(apart) == measured(run(model, processor, captions_file(tmp_path)))
    assert apart.n == PICTURES


def test_ties_count_against_the_right_one() -> None:
    right = torch.eye(4).bool()
    assert ranks(torch.zeros(4, 4), right).tolist() == [3, 3, 3, 3]
    assert ranks(torch.eye(4), right).tolist() == [0, 0, 0, 0]


def test_what_cannot_be_evaluated(tmp_path: Path) -> None:
    data = captions_file(tmp_path)
    model, processor = clip()
    with pytest.raises(InvalidOption, match="and CLIPModel has none"):
        run(model, processor, data, rerank=4)
    with pytest.raises(InvalidOption, match="at least 0"):
        run(model, processor, data, rerank=-1)
    with pytest.raises(InvalidOption, match="compares images with texts"):
        run(*pico.llava(chat=False), data)
    with pytest.raises(InvalidOption, match="both an image processor and a tokenizer"):
        run(model, processor.tokenizer, data)
    with pytest.raises(UnknownName):
        run(model, processor, data, columns={"captoin": "x"})
    rows = [{"image": pairs.picture_file(tmp_path, i)} for i in range(2)]
    with pytest.raises(CalibrationError, match="no caption in row 0"):
        run(model, processor, pairs.write_rows(tmp_path, rows, "bare.jsonl"))
    with torch.no_grad():
        model.visual_projection.weight.fill_(torch.nan)
    with pytest.raises(NonFiniteLoss, match="embedding of an image"):
        run(model, processor, data)
