"""The BLIP line at pico size: captions, questions, retrieval, Q-Formers; and ViLT on two pictures (NLVR2).

transformers ships neither ALBEF nor BLIP's own NLVR2 model; ViLT is the class that it has for two pictures and a text.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import picos
import torch
import transformers
from families.family import Batches, Family
from families.words import START, bert_tokenizer, text_tokenizer
from torch import Tensor, nn
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.vilt.image_processing_pil_vilt import ViltImageProcessorPil

LONGEST, LONGEST_ANSWER = 7, 4
VISION = {
    "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
    "image_size": picos.IMAGE, "patch_size": picos.PATCH, "initializer_range": 0.02,
}  # fmt: skip
TEXT = {
    "vocab_size": len(picos.VOCABULARY), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 32, "encoder_hidden_size": 16, "pad_token_id": picos.PAD,
    "bos_token_id": START, "sep_token_id": picos.EOS, "eos_token_id": picos.EOS,
}  # fmt: skip
QFORMER = {
    "vocab_size": len(picos.VOCABULARY), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "encoder_hidden_size": 24, "cross_attention_frequency": 2, "initializer_range": 0.02,
    "max_position_embeddings": 32, "pad_token_id": picos.PAD,
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "vocab_size": len(picos.VOCABULARY), "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "tie_word_embeddings": False, "pad_token_id": picos.PAD, "eos_token_id": picos.EOS, "bos_token_id": picos.BOS,
}  # fmt: skip


# --- inputs --------------------------------------------------------------------------------------------------------


def _row(ids: list[int], length: int, fill: int = picos.PAD) -> Tensor:
    return torch.tensor(ids + [fill] * (length - len(ids)))


def _picture(generator: torch.Generator) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(3, picos.IMAGE, picos.IMAGE, generator=generator)}


def _ids(generator: torch.Generator, longest: int, padding: bool) -> list[int]:
    count = int(torch.randint(2, longest + 1, (1,), generator=generator)) if padding else longest
    return torch.randint(picos.FIRST_WORD, len(picos.VOCABULARY), (count,), generator=generator).tolist()


def _text(generator: torch.Generator, padding: bool, front: int = picos.BOS) -> dict[str, Tensor]:
    ids = [front, *_ids(generator, LONGEST, padding), picos.EOS]
    return {"input_ids": _row(ids, LONGEST + 2), "attention_mask": _row([1] * len(ids), LONGEST + 2)}


def _caption(generator: torch.Generator, padding: bool) -> dict[str, Tensor]:
    text = _text(generator, padding, START)
    labels = text["input_ids"].masked_fill(text["attention_mask"] == 0, -100)
    return {**_picture(generator), **text, "labels": labels}


def _answer(generator: torch.Generator, padding: bool) -> dict[str, Tensor]:
    ids = [START, *_ids(generator, LONGEST_ANSWER, padding), picos.EOS]
    length = LONGEST_ANSWER + 2
    return {
        **_picture(generator),
        **_text(generator, padding),
        "decoder_input_ids": _row(ids, length),
        "decoder_attention_mask": _row([1] * len(ids), length),
        "labels": _row(ids, length, -100),
    }


def _match(generator: torch.Generator, padding: bool) -> dict[str, Tensor]:
    return {**_picture(generator), **_text(generator, padding)}


def _match_behind_queries(generator: torch.Generator, padding: bool) -> dict[str, Tensor]:
    text = _text(generator, padding)
    ids = torch.full((picos.QUERIES,), picos.IMAGE_TOKEN)
    return {
        **_picture(generator),
        "input_ids": torch.cat([ids, text["input_ids"]]),
        "attention_mask": torch.cat([torch.ones_like(ids), text["attention_mask"]]),
    }


def _matched(batches: Callable[..., Batches], **options: Any) -> Batches:
    """Every picture's wrong text and every text's wrong picture is the next one of its batch."""
    made = batches(**options)
    for batch in made:
        wrong = torch.arange(len(batch["input_ids"])).roll(-1)
        batch |= {"negative_texts": wrong, "negative_images": wrong}
    return made


def _instruct(language: Callable[[torch.Generator, bool], dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    """The language model's inputs, and the instruction again for the Q-Former: as many tokens as it has queries."""

    def sample(generator: torch.Generator, padding: bool) -> dict[str, Tensor]:
        ids = _ids(generator, picos.QUERIES, padding)
        return {
            **language(generator, padding),
            "qformer_input_ids": _row(ids, picos.QUERIES),
            "qformer_attention_mask": _row([1] * len(ids), picos.QUERIES),
        }

    return sample


def _two_pictures(generator: torch.Generator, padding: bool) -> dict[str, Tensor]:
    side = 2 * picos.PATCH
    mask = torch.ones(2, side, side, dtype=torch.long)
    if padding:
        mask[1, :, picos.PATCH :] = 0
    return {
        **_text(generator, padding),
        "pixel_values": torch.randn(2, 3, side, side, generator=generator) * mask[:, None],
        "pixel_mask": mask,
        "labels": torch.randint(2, (), generator=generator),
    }


# --- models --------------------------------------------------------------------------------------------------------


def _blip(head: str, seed: int = 0) -> nn.Module:
    vision = {**VISION, "hidden_size": TEXT["hidden_size"]}  # its decoder attends to pictures and questions alike
    config = transformers.BlipConfig(text_config=TEXT, vision_config=vision, image_text_hidden_size=16)
    return picos.scramble(getattr(transformers, f"Blip{head}")(config), seed)


def _blip2_retrieval(seed: int = 0) -> nn.Module:
    config = transformers.Blip2Config(
        vision_config=VISION, qformer_config={**QFORMER, "use_qformer_text_input": True},
        num_query_tokens=picos.QUERIES, image_token_index=picos.IMAGE_TOKEN, image_text_hidden_size=16,
    )  # fmt: skip
    return picos.scramble(transformers.Blip2ForImageTextRetrieval(config), seed)


def _instructblip(language: dict[str, Any], seed: int = 0) -> nn.Module:
    config = transformers.InstructBlipConfig(
        vision_config=VISION, qformer_config=QFORMER, text_config=language, num_query_tokens=picos.QUERIES,
        image_token_index=picos.IMAGE_TOKEN,
    )  # fmt: skip
    return picos.scramble(transformers.InstructBlipForConditionalGeneration(config), seed)


def _t5() -> dict[str, Any]:
    config = picos.t5().config
    return {**config.to_dict(), "model_type": "t5"}


def _vilt(seed: int = 0) -> nn.Module:
    config = transformers.ViltConfig(
        vocab_size=len(picos.VOCABULARY), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=16, image_size=picos.IMAGE, patch_size=picos.PATCH,
        num_images=2, modality_type_vocab_size=3, num_labels=2, pad_token_id=picos.PAD,
    )  # fmt: skip
    config.id2label, config.label2id = {0: "False", 1: "True"}, {"False": 0, "True": 1}
    return picos.scramble(transformers.ViltForImagesAndTextClassification(config), seed)


# --- processors ----------------------------------------------------------------------------------------------------


def _images() -> Any:
    return BlipImageProcessorPil(size={"height": picos.IMAGE, "width": picos.IMAGE})


def _with_queries(tokenizer: Callable[[], Any]) -> Any:
    return transformers.Blip2Processor(_images(), tokenizer(), num_query_tokens=picos.QUERIES)


def _instructed(end: bool) -> Any:
    return transformers.InstructBlipProcessor(
        _images(), text_tokenizer(end=end), bert_tokenizer(), num_query_tokens=picos.QUERIES
    )


def _vilt_processor() -> Any:
    images = ViltImageProcessorPil(size={"shortest_edge": picos.IMAGE}, size_divisor=picos.PATCH)
    return transformers.ViltProcessor(images, bert_tokenizer())


def _family(
    name: str,
    build: Callable[..., nn.Module],
    sample: Callable[[torch.Generator, bool], dict[str, Tensor]],
    towers: tuple[tuple[str, int], ...],
    processor: Callable[[], Any],
    objective: str | None = None,
) -> Family:
    batches = picos.Family(name, build, sample, {}).batches
    if objective == "itm-itc":
        batches = partial(_matched, batches)
    return Family(name, build, batches, towers, processor, objective)


def _blip_processor() -> Any:
    return transformers.BlipProcessor(_images(), bert_tokenizer())


_T5 = picos.FAMILIES["blip2_t5"]
_OPT = picos.FAMILIES["blip2_opt"]
SEES_AND_SPEAKS = (("vision", 3), ("language", 2))
ENCODES_AND_DECODES = (("vision", 3), ("language", 2), ("language", 2))

FAMILIES: tuple[Family, ...] = (
    _family("blip2_t5", _T5.build, _T5.sample, ENCODES_AND_DECODES, partial(picos.processor, "blip2_t5")),
    _family("blip2_opt", _OPT.build, _OPT.sample, SEES_AND_SPEAKS, partial(picos.processor, "blip2_opt")),
    _family(
        "instructblip_t5", lambda seed=0: _instructblip(_t5(), seed), _instruct(_T5.sample), ENCODES_AND_DECODES,
        partial(_instructed, end=True),
    ),
    _family(
        "instructblip_vicuna", partial(_instructblip, LLAMA), _instruct(_OPT.sample), (("vision", 3), ("language", 3)),
        partial(_instructed, end=False),
    ),
    _family("blip_caption", partial(_blip, "ForConditionalGeneration"), _caption, SEES_AND_SPEAKS, _blip_processor),
    _family("blip_vqa", partial(_blip, "ForQuestionAnswering"), _answer, ENCODES_AND_DECODES, _blip_processor),
    _family(
        "blip_retrieval", partial(_blip, "ForImageTextRetrieval"), _match, SEES_AND_SPEAKS, _blip_processor, "itm-itc"
    ),
    _family(
        "blip2_retrieval", _blip2_retrieval, _match_behind_queries, (("vision", 3),),
        partial(_with_queries, bert_tokenizer), "itm-itc",
    ),
    _family("vilt_nlvr2", _vilt, _two_pictures, (("vision", 2),), _vilt_processor, "classification"),
)  # fmt: skip
