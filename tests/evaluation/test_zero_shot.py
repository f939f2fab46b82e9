from pathlib import Path
from typing import Any

import pairs
import pico
import pytest
import torch
from picos import scramble
from tasks import run_task
from torch import Tensor, nn

from ecoflap.errors import CalibrationError, InvalidOption, NonFiniteLoss

CLASSES = ["circle", "big square", "red triangle", "blue", "small star", "green", "three"]
TEMPLATES = ["a picture of a {}", "the {} on the left", "how many {}"]
PICTURES = 12


class Eva(nn.Module):
    """CLIP under the names of methods that EVA-CLIP's own code has."""

    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.clip, self.config, self.dtype = clip, clip.config, clip.dtype

    def encode_image(self, image: Tensor) -> Tensor:
        return self.clip.get_image_features(image).pooler_output

    def encode_text(self, text: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.clip.get_text_features(text, attention_mask=attention_mask).pooler_output

    def forward(self, input_ids: Tensor, pixel_values: Tensor, attention_mask: Tensor | None = None) -> Any:
        return self.clip(input_ids=input_ids, pixel_values=pixel_values, attention_mask=attention_mask)


def clip() -> tuple[Any, Any]:
    model, processor = pico.clip()
    return scramble(model), processor


def eva() -> tuple[Any, Any]:
    model, processor = clip()
    return Eva(model).eval(), processor


MODELS = {
    "clip": clip,
    "eva": eva,
    "siglip": pairs.siglip,
    "blip": lambda: pairs.blip("retrieval"),
    "blip2": pairs.blip2_retrieval,
}


def pictures_file(folder: Path, labels: list[str] | None = None) -> Path:
    labels = labels or [CLASSES[i % len(CLASSES)] for i in range(PICTURES)]
    rows = [{"image": pairs.picture_file(folder, i), "label": label} for i, label in enumerate(labels)]
    return pairs.write_rows(folder, rows)


def run(model: Any, processor: Any, data: Path, **options: Any) -> Any:
    return run_task("zero-shot", model, processor, data=data, **{"samples": None, "batch_size": 5, **options})


@torch.no_grad()
def embedded(name: str, model: Any, processor: Any, picture: int, text: str) -> tuple[Tensor, Tensor]:
    """Normalised embeddings of one picture ``[Q, D]`` and one text ``[D]`` from a whole forward."""
    padding = {"padding": "max_length", "max_length": 16} if name == "siglip" else {}
    inputs = processor(images=[pico.picture(picture)], text=[text], return_tensors="pt", **padding)
    if name == "blip":
        output = model(**inputs, use_itm_head=False)
        seen, read = model.vision_proj(output.last_hidden_state[:, 0]), model.text_proj(output.question_embeds[:, 0])
    else:
        output = model(**inputs)
        seen, read = output.image_embeds, output.text_embeds
    unit = torch.nn.functional.normalize
    return unit(seen.reshape(-1, seen.shape[-1]), dim=-1), unit(read[0], dim=-1)


@pytest.mark.parametrize("name", MODELS)
def test_accuracy_equals_that_of_single_forwards(name: str, tmp_path: Path) -> None:
    model, processor = MODELS[name]()
    result = run(model, processor, pictures_file(tmp_path), class_prompts=TEMPLATES, classes=CLASSES)
    centres = []
    for label in CLASSES:
        texts = [embedded(name, model, processor, 0, template.format(label))[1] for template in TEMPLATES]
        mean = sum(texts) / len(texts)
        centres.append(mean / mean.norm())
    first, fifth, said = [], [], []
    for picture in range(PICTURES):
        queries = embedded(name, model, processor, picture, "a")[0]
        scores = [max(float(query @ centre) for query in queries) for centre in centres]
        order = sorted(range(len(CLASSES)), key=lambda c: -scores[c])
        first.append(float(order[0] == picture % len(CLASSES)))
        fifth.append(float(picture % len(CLASSES) in order[:5]))
        said.append(CLASSES[order[0]])
    assert (result.metric, result.n) == ("top-1 accuracy", PICTURES)
    assert [r["prediction"] for r in result.predictions] == said
    assert [r["score"] for r in result.predictions] == first
    p, q = sum(first) / PICTURES, sum(fifth) / PICTURES
    assert (result.value, result.stderr) == pytest.approx((p, (p * (1 - p) / (PICTURES - 1)) ** 0.5))
    assert result.others["top-5 accuracy"].value == pytest.approx(q)
    assert result.settings["class_prompts"] == TEMPLATES


def test_classes_are_those_of_all_rows(tmp_path: Path) -> None:
    model, processor = clip()
    data = pictures_file(tmp_path)
    few = run(model, processor, data, samples=2, seed=1)
    given = run(model, processor, data, samples=2, seed=1, classes=sorted(CLASSES), class_prompts=["a photo of a {}."])
    assert few.settings["classes"] == len(CLASSES)
    assert few.predictions == given.predictions
    two = run(model, processor, pictures_file(tmp_path, ["red", "blue"] * 3))
    assert two.others == {}  # the best five of two are all


def test_names_stand_for_folders_by_their_order(tmp_path: Path) -> None:
    model, processor = clip()
    for number in range(PICTURES):
        folder = tmp_path / "set" / f"n{number % len(CLASSES):05d}"
        folder.mkdir(parents=True, exist_ok=True)
        pairs.picture_file(folder, number)
    named = run(model, processor, tmp_path / "set", classes=CLASSES)
    plain = run(model, processor, pictures_file(tmp_path), classes=CLASSES)
    assert named.value == plain.value
    assert {r["truth"] for r in named.predictions} == set(CLASSES)


def test_what_cannot_be_evaluated(tmp_path: Path) -> None:
    model, processor = clip()
    data = pictures_file(tmp_path)
    with pytest.raises(CalibrationError, match="label 'circle' is none of the given 2 classes"):
        run(model, processor, data, classes=["red", "blue"])
    with pytest.raises(InvalidOption, match=r"no \{\}"):
        run(model, processor, data, class_prompts=["a photo"])
    with pytest.raises(InvalidOption, match="has 1 classes"):
        run(model, processor, pictures_file(tmp_path, ["red"] * 3))
    with pytest.raises(InvalidOption, match="compares images with texts"):
        run(pico.vit(CLASSES)[0], processor, data)
    data = pictures_file(tmp_path)
    with torch.no_grad():
        model.text_projection.weight.fill_(torch.inf)
    with pytest.raises(NonFiniteLoss, match="embedding of a class"):
        run(model, processor, data)
