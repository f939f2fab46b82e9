"""Modality of a tower, and which tower is a decoder: by what models declare and do, not by names alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from families.matrix import FAMILIES, case
from family_sweep.pico import shrunk
from torch import Tensor, nn

import ecoflap
from ecoflap.model.anatomy import discover
from ecoflap.statistics.dense import dense_norms
from ecoflap.statistics.later import decoder_of


def written_pictures() -> tuple[nn.Module, dict[str, Tensor]]:
    """A VisionEncoderDecoder: its two towers are called ``encoder`` and ``decoder``."""
    torch.manual_seed(0)
    eye = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=8
    )
    pen = transformers.TrOCRConfig(
        vocab_size=60, d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48,
        max_position_embeddings=32, cross_attention_hidden_size=32,
    )  # fmt: skip
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(eye, pen)
    config.decoder_start_token_id, config.pad_token_id = 2, 1
    model = transformers.VisionEncoderDecoderModel(config=config).eval()
    labels = torch.randint(5, 60, (2, 6))
    labels[1, 4:] = -100
    return model, {"pixel_values": torch.randn(2, 3, 16, 16), "labels": labels}


def heard() -> tuple[nn.Module, dict[str, Tensor]]:
    """A Whisper."""
    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        vocab_size=60, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, num_mel_bins=8,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_source_positions=20,
        max_target_positions=20, pad_token_id=1, bos_token_id=2, eos_token_id=3, decoder_start_token_id=3,
    )  # fmt: skip
    model = transformers.WhisperForConditionalGeneration(config).eval()
    return model, {"input_features": torch.randn(2, 8, 40), "labels": torch.randint(5, 60, (2, 8))}


@pytest.mark.parametrize(("make", "modality"), [(written_pictures, "vision"), (heard, "audio")])
@pytest.mark.parametrize("traced", [True, False])
def test_an_encoder_has_the_modality_of_what_it_takes(make: Any, modality: str, traced: bool) -> None:
    model, batch = make()
    towers = discover(model, batch if traced else None).towers
    assert {tower.name.partition("layers")[0]: tower.modality for tower in towers}.popitem()[1] == "language"
    assert [tower.modality for tower in towers] == [modality, "language"]
    assert [tower.decoder for tower in towers] == [False, True]


def test_a_decoder_of_words_is_language_whatever_the_model_says_of_itself() -> None:
    """PP-FormulaNet declares for all its parts that it takes pictures; its decoder reads words alone."""
    torch.manual_seed(0)
    model = transformers.PPFormulaNetForConditionalGeneration(shrunk("pp_formulanet")).eval()
    ids = torch.randint(5, 50, (2, 6))
    batch = {"pixel_values": torch.randn(2, 3, 64, 64), "decoder_input_ids": ids, "labels": ids}
    towers = discover(model, batch).towers
    assert [(tower.modality, tower.decoder) for tower in towers] == [("vision", False), ("language", True)]


def test_sparsity_by_modality_reaches_a_tower_whose_name_says_nothing() -> None:
    model, batch = written_pictures()
    result = ecoflap.prune(model, [batch], sparsity=0.5, importance="uniform", tower_sparsity={"vision": 0.25})
    vision = [row for row in result.allocation.layers if row.modality == "vision"]
    zeros = sum(int((model.get_parameter(row.name) == 0).sum()) for row in vision)
    assert zeros == pytest.approx(0.25 * sum(row.weights for row in vision), abs=1)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.fc(x))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class TwoStacks(nn.Module):
    """One sequence goes through two stacks; the second is no decoder of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 6)
        self.lower, self.upper = Stack(), Stack()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        return self.upper(self.lower(self.embedding(input_ids)))[labels != -100].square().mean()


def test_a_second_tower_of_text_counts_all_real_tokens() -> None:
    torch.manual_seed(0)
    model = TwoStacks().eval()
    ids = torch.randint(0, 20, (3, 7))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :3] = -100  # a prompt is no target, yet it is read
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def run(model: nn.Module, batch: Any) -> Any:
        return model(**batch)

    anatomy = discover(model, batch)
    assert decoder_of(anatomy) is None
    norms = dense_norms(model, anatomy, [batch], run)
    with torch.no_grad():
        x = model.embedding(ids)
        for name, block in [
            *((f"lower.layers.{i}", block) for i, block in enumerate(model.lower.layers)),
            *((f"upper.layers.{i}", block) for i, block in enumerate(model.upper.layers)),
        ]:
            found = norms[f"{name}.fc.weight"]
            assert found.tokens == int(mask.sum())
            squares = x[mask.bool()].square().sum(0)
            torch.testing.assert_close(found.norm.double() ** 2, squares.double(), rtol=1e-4, atol=1e-6)  # type: ignore[attr-defined]
            x = block(x)


class Seer(nn.Module):
    """No configuration, no telling name: what reached it says what it is."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Stack(), Stack()
        self.embedding = nn.Embedding(20, 6)

    def forward(self, pixel_values: Tensor, input_ids: Tensor) -> Tensor:
        return (self.two(self.embedding(input_ids)) + self.one(pixel_values * 2).mean(1, keepdim=True)).square().mean()


def test_inputs_tell_where_names_and_configurations_say_nothing() -> None:
    batch = {"pixel_values": torch.randn(2, 4, 6), "input_ids": torch.randint(0, 20, (2, 5))}
    towers = discover(Seer(), batch).towers
    assert {tower.name: tower.modality for tower in towers} == {"one.layers": "vision", "two.layers": "language"}


@pytest.mark.parametrize("name", FAMILIES)
def test_decoders_are_those_of_encoder_decoders(name: str) -> None:
    found = case(name)
    language = [tower for tower in found.anatomy.towers if tower.modality == "language"]
    decoder = decoder_of(found.anatomy)
    assert (decoder is not None) == (len(language) > 1)  # every family of the matrix with two is one
    assert decoder is None or decoder.name == language[-1].name


def test_a_decoder_alone_is_still_one() -> None:
    model = copy.deepcopy(case("t5").model)
    anatomy = discover(model, case("t5").batches[0], exclude=["encoder.block"], run=case("t5").loss)
    assert [tower.name for tower in anatomy.towers] == ["decoder.block"]
    assert anatomy.towers[0].decoder
