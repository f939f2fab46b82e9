from typing import Any

import pico
import pytest
import torch
import torch.nn.functional as F

from ecoflap.data import Sample, SampleSet, batch_size_of, make_batches, resolve, to_device, token_masks
from ecoflap.errors import CalibrationError

QUESTIONS = [
    ("what color is the circle", "red"),
    ("what shape", "square triangle"),
    ("is there a big square on the left", "yes"),
    ("how many", "two"),
    ("what is on the right of the small triangle and with the circle", "no"),
]
CAPTIONS = ["a red circle and a blue square", "picture of one triangle", "two", "the small circle on the left"]


def questions(images: bool = True) -> SampleSet:
    samples = tuple(
        Sample((pico.picture(i),) if images else (), f"Question: {q} Short answer:", a, q)
        for i, (q, a) in enumerate(QUESTIONS)
    )
    return SampleSet(samples, tuple(range(len(samples))), 0, "questions", {})


def captions(images: bool = True) -> SampleSet:
    samples = tuple(Sample((pico.picture(i),) if images else (), None, c) for i, c in enumerate(CAPTIONS))
    return SampleSet(samples, tuple(range(len(samples))), 0, "captions", {})


def text_model(kind: str) -> tuple[Any, Any]:
    words = pico.tokenizer(pad=kind != "llama-nopad", eos=kind == "t5", bos=kind != "t5")
    return (pico.t5(len(words)) if kind == "t5" else pico.llama(len(words))), words


MODELS = {
    "blip2-t5": lambda: pico.blip2(),
    "blip2-opt": lambda: pico.blip2(text="opt"),
    "llava": lambda: pico.llava(chat=False),
    "llava-chat": lambda: pico.llava(chat=True),
    "llama": lambda: text_model("llama"),
    "llama-nopad": lambda: text_model("llama-nopad"),
    "t5": lambda: text_model("t5"),
}


@torch.no_grad()
def token_losses(model: Any, batch: dict[str, torch.Tensor]) -> list[float]:
    """Cross-entropy of each labelled token by its own formula, not the model's loss."""
    logits = model(**batch, use_cache=False).logits.float()
    labels = batch["labels"]
    if not model.config.get_text_config().is_encoder_decoder:
        logits, labels = logits[:, :-1], labels[:, 1:]
    nll = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=-100)
    return nll[labels.flatten() != -100].tolist()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("data", [questions, captions], ids=["questions", "captions"])
def test_padding_leaves_the_loss_unchanged(name: str, data: Any) -> None:
    """The loss of a padded batch is the mean over the tokens of its samples computed one at a time."""
    model, processor = MODELS[name]()
    samples = data()
    (batch,) = make_batches(samples, model, processor, batch_size=9, seed=2)
    singles = make_batches(samples, model, processor, batch_size=1, seed=2)
    alone = [loss for single in singles for loss in token_losses(model, single)]
    assert len(alone) == int((batch["labels"] != -100).sum())
    loss = resolve(None, model)(model, batch)
    assert loss.dtype == torch.float32
    assert loss.ndim == 0
    assert float(loss.detach()) == pytest.approx(sum(alone) / len(alone), rel=1e-4)
    assert batch_size_of(batch) == len(samples.samples)


@pytest.mark.parametrize("name", ["blip2-opt", "llava", "llava-chat", "llama", "llama-nopad"])
def test_labels_are_the_answer_and_nothing_else(name: str) -> None:
    model, processor = MODELS[name]()
    words = getattr(processor, "tokenizer", processor)
    (batch,) = make_batches(questions(), model, processor, batch_size=9)
    for ids, labels, mask, (_, answer) in zip(
        batch["input_ids"], batch["labels"], batch["attention_mask"], QUESTIONS, strict=True
    ):
        kept = labels != -100
        assert words.decode(labels[kept]) == f"{answer} </s>"
        assert torch.equal(ids[kept], labels[kept])
        assert int(kept.nonzero()[-1]) == int(mask.nonzero()[-1])  # the answer ends where padding begins


@pytest.mark.parametrize("name", ["blip2-t5", "t5"])
def test_encoder_decoder_captions_are_cut_once_by_the_seed(name: str) -> None:
    model, processor = MODELS[name]()
    words = getattr(processor, "tokenizer", processor)

    def cut(seed: int, size: int) -> list[tuple[str, str]]:
        out = []
        for batch in make_batches(captions(), model, processor, batch_size=size, seed=seed):
            for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
                plain = [i for i in ids.tolist() if words.convert_ids_to_tokens(i) != "<image>"]
                out.append((words.decode(plain, skip_special_tokens=True), words.decode(labels[labels != -100])))
        return out

    pairs = cut(0, 4)
    for (prefix, suffix), caption in zip(pairs, CAPTIONS, strict=True):
        assert f"{prefix} {suffix}".strip() == f"{caption} </s>"
        assert prefix or " " not in caption
    assert pairs == cut(0, 1) == cut(0, 4)
    assert any(cut(seed, 4) != pairs for seed in range(1, 5))


def test_token_masks() -> None:
    model, processor = MODELS["blip2-t5"]()
    (batch,) = make_batches(questions(), model, processor, batch_size=9)
    masks = token_masks(batch, True)
    assert masks.encoder is not None
    assert torch.equal(masks.encoder, batch["attention_mask"] == 1)
    assert masks.decoder is not None
    assert torch.equal(masks.decoder, batch["labels"] != -100)
    assert token_masks(batch, False).decoder is None
    full = {"attention_mask": torch.ones(2, 3), "labels": torch.zeros(2, 3)}
    assert token_masks(full, True) == token_masks({}, True)  # all real: no masks
    given = {"decoder_attention_mask": torch.tensor([[1, 0]]), "labels": torch.tensor([[-100, 1]])}
    decoder = token_masks(given, True).decoder
    assert decoder is not None
    assert decoder.tolist() == [[True, False]]


def test_dual_tower() -> None:
    model, processor = pico.clip()
    long = Sample((pico.picture(9),), None, "a red circle " * 10)  # more than the text tower has positions for
    data = SampleSet((*captions().samples, long), (0, 1, 2, 3, 4), 0, "x", {})
    batches = make_batches(data, model, processor, batch_size=2)
    assert [batch_size_of(b) for b in batches] == [2, 3]  # a lone pair has nothing to contrast with
    assert batches[1]["input_ids"].shape[1] == 12
    batch = batches[1]
    with torch.no_grad():
        out = model(**batch)
        logits = out.text_embeds @ out.image_embeds.T * model.logit_scale.exp()
        target = torch.arange(3)
        want = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        assert float(resolve(None, model)(model, batch)) == pytest.approx(float(want), rel=1e-5)
    with pytest.raises(CalibrationError, match="at least 2 samples"):
        make_batches(data, model, processor, batch_size=1)


def test_image_classifier() -> None:
    model, processor = pico.vit(["circle", "square"])
    samples = tuple(Sample((pico.picture(i),), None, label) for i, label in enumerate(["square", "Circle", "1"]))
    (batch,) = make_batches(SampleSet(samples, (0, 1, 2), 0, "x", {}), model, processor, batch_size=4)
    assert batch["labels"].tolist() == [1, 0, 1]
    assert batch["pixel_values"].shape == (3, 3, 16, 16)
    with torch.no_grad():
        want = F.cross_entropy(model(batch["pixel_values"]).logits, batch["labels"])
        assert float(resolve(None, model)(model, batch)) == pytest.approx(float(want), rel=1e-5)
    wrong = SampleSet((Sample((pico.picture(0),), None, "hexagon"),), (0,), 0, "x", {})
    with pytest.raises(CalibrationError, match="label 'hexagon' is none of the model's 2 classes"):
        make_batches(wrong, model, processor, batch_size=4)


@pytest.mark.parametrize("name", MODELS)
def test_same_call_same_batches_and_tokenizer_untouched(name: str) -> None:
    model, processor = MODELS[name]()
    words = getattr(processor, "tokenizer", processor)
    before = (words.pad_token, words.padding_side, len(words))
    first, second = (make_batches(questions(), model, processor, batch_size=2, seed=0) for _ in range(2))
    assert (words.pad_token, words.padding_side, len(words)) == before
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in a)
        assert all(v.device.type == "cpu" and v.is_contiguous() for v in a.values())


def test_what_does_not_fit_is_one_line() -> None:
    model, processor = pico.blip2()
    cases = [
        (questions(images=False), "has no images, but Blip2ForConditionalGeneration needs them", {}),
        (SampleSet((Sample((pico.picture(0),)),), (0,), 0, "x", {}), "no answers or captions", {}),
        (questions(), "more than the sequence length of 8", {"sequence_length": 8}),
        (questions(), "batch size must be at least 1", {"batch_size": 0}),
    ]
    for data, message, options in cases:
        with pytest.raises(CalibrationError, match=message):
            make_batches(data, model, processor, **{"batch_size": 2, **options})
    with pytest.raises(CalibrationError, match="no processor"):
        make_batches(questions(), model, None, batch_size=2)
    for queries in (None, 2):  # none, or too few placeholders: blind, or half blind
        model, processor = pico.blip2(queries=queries)
        with pytest.raises(CalibrationError, match="num_query_tokens"):
            make_batches(questions(), model, processor, batch_size=2)


def test_to_device_casts_floats_alone() -> None:
    model, processor = pico.blip2()
    (batch,) = make_batches(questions(), model, processor, batch_size=9)
    same = to_device(batch, model)
    assert all(same[k] is batch[k] for k in batch)  # nothing to do, nothing copied
    half = to_device(batch, model.to(torch.bfloat16))
    assert half["pixel_values"].dtype == torch.bfloat16
    assert half["labels"].dtype == torch.int64
