from typing import Any

import pairs
import pico
import pytest
import torch

from ecoflap.data.prompts import Prompter
from ecoflap.data.sample import Sample
from ecoflap.errors import InvalidOption
from ecoflap.evaluation.generate import generate

QUESTIONS = ["what color is the circle", "what shape", "is there a big square on the left", "", "how many"]


def samples() -> list[Sample]:
    return [Sample((pico.picture(i),), prompt) for i, prompt in enumerate(QUESTIONS)]


@torch.no_grad()
def blip_alone(model: Any, processor: Any, sample: Sample, steps: int) -> str:
    """Greedy text of BLIP's parts for one sample, by repeated full forwards of its decoder."""
    inputs = processor(images=[sample.image], text=[sample.prompt], return_tensors="pt")
    seen = model.vision_model(inputs["pixel_values"]).last_hidden_state
    begun = [3]
    if hasattr(model, "text_encoder"):
        seen = model.text_encoder(inputs["input_ids"], encoder_hidden_states=seen).last_hidden_state
    else:
        begun += inputs["input_ids"][0, 1:-1].tolist()
    said: list[int] = []
    for _ in range(steps):
        logits = model.text_decoder(
            input_ids=torch.tensor([begun + said]), encoder_hidden_states=seen, use_cache=False
        ).logits
        said.append(int(logits[0, -1].argmax()))
        if said[-1] == 1:
            break
    return processor.tokenizer.decode(said, skip_special_tokens=True).strip()


@pytest.mark.parametrize("task", ["questions", "captions"])
def test_blip_says_in_a_batch_what_its_parts_say_alone(task: str) -> None:
    model, processor = pairs.blip(task)
    said = generate(model, Prompter(model, processor), samples(), new_tokens=6)
    assert said == [blip_alone(model, processor, sample, 6) for sample in samples()]
    assert len(set(said)) > 2


@torch.no_grad()
def log_likelihood(model: Any, inputs: dict[str, Any], said: list[int]) -> float:
    ids = torch.cat([inputs["input_ids"], torch.tensor([said])], 1)
    logits = model(**{**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}, use_cache=False).logits
    scores = logits[0].log_softmax(-1)
    start = inputs["input_ids"].shape[1]
    return sum(float(scores[start + i - 1, token]) for i, token in enumerate(said))


def test_beams_find_what_is_likelier_than_the_greedy_text() -> None:
    model, processor = pico.llava(chat=False)
    prompter = Prompter(model, processor)
    gains = []
    for sample in samples()[:3]:
        inputs = dict(processor(images=[sample.image], text=[f"<image>\n{sample.prompt}"], return_tensors="pt"))
        value = {}
        for beams in (1, 8):
            said = generate(model, prompter, [sample], new_tokens=3, min_tokens=3, beams=beams, length_penalty=0.0)[0]
            value[beams] = log_likelihood(
                model, inputs, processor.tokenizer(said, add_special_tokens=False)["input_ids"]
            )
        gains.append(value[8] - value[1])
    assert min(gains) > -1e-4
    assert max(gains) > 1e-3


def test_numbers_out_of_range() -> None:
    model, processor = pico.llava(chat=False)
    for options in ({"beams": 0}, {"min_tokens": 4}, {"new_tokens": 0}):
        with pytest.raises(InvalidOption, match="must be at least"):
            generate(model, Prompter(model, processor), samples()[:1], **{"new_tokens": 3, **options})
