"""Models of open_clip: both towers pruned, saved in its format, and the recipe of EVA-CLIP run whole at pico size.

The package itself is tested where it can be imported (its torchvision must fit torch). A stand-in with the three
functions that we call, which builds a model of the same parts, is tested everywhere.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import picos
import published
import pytest
import torch
from families.vlm_words import picture
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import ecoflap
from ecoflap.data import Sample, SampleSet, make_batches
from ecoflap.errors import CheckpointError, InvalidOption, MissingDependency
from ecoflap.model.checkpoint import load
from ecoflap.model.files import check_place, is_open_clip, locate
from ecoflap.model.open_clip import CONFIG, WEIGHTS
from ecoflap.model.save import save
from ecoflap.run.pipeline import run_recipe
from ecoflap.run.recipe import Recipe

RECIPE = Path(__file__).parents[2] / "recipes" / "eva" / "eva-clip-vit-g.yaml"
CONFIGURATION = {
    "model_cfg": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 16, "layers": 2, "width": 32, "head_width": 8, "patch_size": 8},
        "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2},
    },
    "preprocess_cfg": {"size": 16},
}
END = 49407


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attn(x, x, x, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(x)


class Tower(nn.Module):
    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads) for _ in range(layers))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Clip(nn.Module):
    def __init__(self, model_cfg: dict[str, Any]) -> None:
        super().__init__()
        vision, text = model_cfg["vision_cfg"], model_cfg["text_cfg"]
        self.visual = nn.Module()
        self.visual.conv1 = nn.Conv2d(3, vision["width"], vision["patch_size"], vision["patch_size"])
        self.visual.transformer = Tower(vision["width"], vision["width"] // vision["head_width"], vision["layers"])
        self.visual.proj = nn.Parameter(torch.randn(vision["width"], model_cfg["embed_dim"]) / 4)
        self.token_embedding = nn.Embedding(text["vocab_size"], text["width"])
        self.transformer = Tower(text["width"], text["heads"], text["layers"])
        self.text_projection = nn.Parameter(torch.randn(text["width"], model_cfg["embed_dim"]) / 4)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def encode_image(self, image: Tensor) -> Tensor:
        x = self.visual.conv1(image).flatten(2).transpose(1, 2)
        return self.visual.transformer(x).mean(dim=1) @ self.visual.proj

    def encode_text(self, text: Tensor) -> Tensor:
        length = text.shape[1]
        mask = torch.full((length, length), -torch.inf, dtype=self.text_projection.dtype).triu(1)
        x = self.transformer(self.token_embedding(text), mask)
        return x[torch.arange(len(x)), text.argmax(dim=-1)] @ self.text_projection


class Tokenizer:
    eot_token_id = END

    def __call__(self, texts: list[str]) -> Tensor:
        found = torch.zeros(len(texts), 12, dtype=torch.long)
        for row, text in zip(found, texts, strict=True):
            words = [sum(map(ord, word)) % 400 + 1 for word in text.split()][:10]
            row[: len(words) + 2] = torch.tensor([END - 1, *words, END])
        return found


def stand_in() -> types.ModuleType:
    module: Any = types.ModuleType("open_clip")
    module.__spec__ = importlib.machinery.ModuleSpec("open_clip", None)

    def create_model(where: str, load_weights: bool, pretrained_text: bool) -> nn.Module:
        assert not load_weights
        assert not pretrained_text
        if not where.startswith("local-dir:"):
            return Clip(CONFIGURATION["model_cfg"])
        return Clip(json.loads((Path(where.removeprefix("local-dir:")) / CONFIG).read_text("utf-8"))["model_cfg"])

    module.create_model = create_model
    module.get_model_config = lambda name: CONFIGURATION["model_cfg"] if name == "pico" else None
    module.get_tokenizer = lambda where: Tokenizer()
    return module


def _imports() -> bool:
    try:
        import open_clip  # noqa: F401
    except Exception:
        return False
    return True


@pytest.fixture(params=["stand-in", "package"])
def folder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A pico model in open_clip's format."""
    if request.param == "package":
        if not _imports():
            pytest.skip("open_clip can't be imported here")
    else:
        monkeypatch.setitem(sys.modules, "open_clip", stand_in())
    import open_clip

    found = tmp_path / "model"
    found.mkdir()
    (found / CONFIG).write_text(json.dumps(CONFIGURATION), "utf-8")
    clip = open_clip.create_model(f"local-dir:{found}", load_weights=False, pretrained_text=False)
    save_file({n: t.contiguous() for n, t in picos.scramble(clip, 0).state_dict().items()}, found / WEIGHTS)
    return found


def test_both_towers_are_pruned_and_saved_in_its_format(folder: Path, tmp_path: Path) -> None:
    assert is_open_clip(folder)
    found = load(f"open_clip:{folder}", device="cpu")
    stored = load_file(folder / WEIGHTS)
    model: Any = found.model
    assert all(torch.equal(t, stored[name]) for name, t in model.clip.state_dict().items())
    samples = tuple(
        Sample((picture(n, 20, 24),), text=text)
        for n, text in enumerate(("a photo of a cat", "a dog", "one red star and two more", "sky"))
    )
    drawn = SampleSet(samples, (0, 1, 2, 3), 0, "pictures", {})
    batches = make_batches(drawn, model, found.processor, batch_size=2, objective="contrastive")
    assert batches[0]["pixel_values"].shape == (2, 3, 16, 16)
    assert batches[0]["attention_mask"].sum(dim=1).tolist()[1] == 4  # start, two words, end
    with torch.no_grad():
        output = model(**batches[0], return_loss=True)
        padded = batches[0]["input_ids"].masked_fill(batches[0]["attention_mask"] == 0, 7)
        torch.testing.assert_close(model.get_text_features(padded), model.get_text_features(batches[0]["input_ids"]))
    similar = output.image_embeds @ output.text_embeds.t() * model.clip.logit_scale.exp()
    torch.testing.assert_close(output.logits_per_image, similar)
    own = (similar.log_softmax(0).diagonal() + similar.log_softmax(1).diagonal()).mean() / -2
    torch.testing.assert_close(output.loss, own)
    result = ecoflap.prune(model, batches, sparsity=0.5, importance="gradient-norm",
                           loss=lambda model, batch: model(**batch, return_loss=True).loss)  # fmt: skip
    assert [(tower.modality, len(tower.blocks)) for tower in result.anatomy.towers] == [("vision", 2), ("language", 2)]
    assert len(result.anatomy.layers) == 4 * 6  # q, k, v, output, and two of the small network
    assert result.anatomy.unprunable == ()
    assert result.unreached == ()
    assert result.sparsity == pytest.approx(0.5, abs=1e-3)
    save(found, tmp_path / "pruned")
    again = load(tmp_path / "pruned", device="cpu")  # needs no prefix
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in again.model.state_dict().items())
    assert load_file(tmp_path / "pruned" / WEIGHTS).keys() == stored.keys()


@pytest.mark.usefixtures("pageless")
def test_the_recipe_of_eva_clip(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for split in ("train", "test"):
        published.class_folders(tmp_path / "data" / split, ["001", "002", "003"])
    values = Recipe.load([RECIPE]).to_dict() | {
        "model": f"open_clip:{folder}", "calibration": "data/train", "test": "data/test", "samples": 6,
        "importance_samples": 2, "batch_size": 3, "device": "cpu", "classes": ["cat", "dog", "star"],
        "class_prompts": ["a photo of a {}."],
    }  # fmt: skip
    run = run_recipe(Recipe.parse(values), "run")
    metrics = json.loads((run / "metrics.json").read_text("utf-8"))
    assert metrics["sparsity"]["prunable"] == pytest.approx(0.5, abs=1e-3)
    assert metrics["pruned"]["zero-shot"]["n"] == 9
    assert (run / "model" / WEIGHTS).is_file()


def test_what_cannot_be_loaded_is_told(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="not packed"):
        locate(folder)
    with pytest.raises(CheckpointError, match=r"no model of open_clip in '/no/such'"):
        check_place("open_clip:/no/such")
    with pytest.raises(InvalidOption, match="leave out device_map"):
        load(folder, device_map="disk")
    (folder / WEIGHTS).rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="no safetensors"):
        load(folder)
    save_file({"other": torch.ones(1)}, folder / WEIGHTS)
    with pytest.raises(CheckpointError, match="cannot be loaded by open_clip"):
        load(folder)
    with pytest.raises(CheckpointError, match="no folder, no architecture"):
        load("open_clip:no/such-model")
    monkeypatch.setitem(sys.modules, "open_clip", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match="open-clip"):
        load("open_clip:ViT-B-32")


def test_a_name_alone_has_random_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", stand_in())
    found = load("open_clip:pico", device="cpu", dtype="bfloat16")
    assert found.dtype == torch.bfloat16
    assert any("random" in line for line in found.warnings)
