"""Builds the prompt that a processor expects from text and image: chat template, image placeholder, or plain."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from PIL import Image
from torch import nn

from ecoflap.data.chat import answer_turn, plain_prompt, turns_of
from ecoflap.data.images import MOST_PIXELS
from ecoflap.data.model_facts import image_token_id, parameters_of
from ecoflap.data.sample import Sample
from ecoflap.errors import CalibrationError
from ecoflap.model.files import quiet
from ecoflap.support.text import first_line

LEAST_KEPT = 1 << 22  # calibration images are not scaled below this number of pixels
_LONGEST_SIDE = 1 << 14  # a larger number in a processor's size is a number of pixels


def _is_tokenizer(processor: Any) -> bool:
    from transformers import PreTrainedTokenizerBase  # takes a second, see ecoflap.run.checks

    return isinstance(processor, PreTrainedTokenizerBase)


def tokenizer_of(processor: Any) -> Any | None:
    """The tokenizer of a processor (or the tokenizer itself); None if there is none."""
    if _is_tokenizer(processor):
        return processor
    return getattr(processor, "tokenizer", None)


def image_processor_of(processor: Any) -> Any | None:
    """The image processor of a processor (or the image processor itself); None if there is none."""
    if _is_tokenizer(processor):
        return None
    half = getattr(processor, "image_processor", None)
    if half is None and getattr(processor, "tokenizer", None) is None and callable(processor):
        half = processor
    return half


def pixels_used(processor: Any) -> int:
    """Pixels of an image that a processor uses, at least :data:`LEAST_KEPT` and at most :data:`MOST_PIXELS`.

    Its ``size`` has sides, or (Qwen2-VL) numbers of pixels; ``max_pixels`` and ``image_grid_pinpoints`` may have more.
    """
    image_processor = image_processor_of(processor)
    size = getattr(image_processor, "size", None)
    numbers = [n for n in (dict(size).values() if isinstance(size, Mapping) else (size,)) if isinstance(n, int)]
    found = [n if n > _LONGEST_SIDE else n * n for n in numbers]
    found += [n for n in (getattr(image_processor, "max_pixels", None),) if isinstance(n, int)]
    grid = getattr(image_processor, "image_grid_pinpoints", None)
    found += [a * b for a, b in grid] if isinstance(grid, list) else []
    return min(max(LEAST_KEPT, *found), MOST_PIXELS) if found else LEAST_KEPT


@contextmanager
def padding_token(tokenizer: Any) -> Iterator[None]:
    """Context in which a tokenizer without pad token uses the end token."""
    if tokenizer is None or tokenizer.pad_token_id is not None:
        yield
        return
    substitute = tokenizer.eos_token or tokenizer.unk_token
    if substitute is None:
        raise CalibrationError("the tokenizer has neither a pad, an end nor an unknown token to pad with")
    tokenizer.pad_token = substitute
    try:
        yield
    finally:
        tokenizer.pad_token = None


@contextmanager
def padded_on(tokenizer: Any, side: str) -> Iterator[None]:
    """Context in which the tokenizer pads on ``side``, also in a processor that reads only this attribute (Kosmos-2).

    At exit the settings are restored: a fast tokenizer would save its last padding.
    """
    before, backend = getattr(tokenizer, "padding_side", None), getattr(tokenizer, "_tokenizer", None)
    padding = getattr(backend, "padding", None)
    if before is not None:
        tokenizer.padding_side = side
    try:
        yield
    finally:
        if before is not None:
            tokenizer.padding_side = before
        if backend is not None and padding is None and getattr(backend, "padding", None) is not None:
            backend.no_padding()


class ProcessorRefused(CalibrationError):
    """A tokenizer or processor raised an error, which is the ``__cause__``."""


@contextmanager
def using_processor() -> Iterator[None]:
    """Context that turns an error of a tokenizer or processor into ProcessorRefused, with a message of one line."""
    try:
        yield
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise ProcessorRefused(
            f"the checkpoint's tokenizer or processor can't read the data ({type(error).__name__}: "
            f"{first_line(error)}): check its tokenizer_config.json and preprocessor_config.json, and the data"
        ) from error


class Prompter:
    """Renders prompts for one model and processor, and encodes them together with the images.

    How the text marks images is found once, on the first sample: by the chat template if there is one, by the processor
    itself (BLIP-2, PaliGemma), or by the placeholder before the prompt (LLaVA).

    Raises:
        CalibrationError: the processor inserts another number of placeholders than the model has image queries.
    """

    def __init__(self, model: nn.Module, processor: Any) -> None:
        self.processor = processor
        self.tokenizer = tokenizer_of(processor)
        self._model = model
        self._chat = bool(getattr(processor, "chat_template", None))
        self._parts = processor is not self.tokenizer  # a processor's template takes parts, a tokenizer's a string
        self._placeholder: str | None = None  # of the first image, None until it is known

    @property
    def is_chat(self) -> bool:
        return self._chat

    @property
    def takes_suffix(self) -> bool:
        """Whether the processor takes the answer apart from the prompt, for full attention within the prompt."""
        return self._parts and not self._chat and "suffix" in inspect.signature(self.processor.__call__).parameters

    def render(self, sample: Sample) -> str:
        """The text before the answer."""
        if self._chat:
            return self._template(turns_of(sample, parts=self._parts), add_generation_prompt=True)
        prompt = plain_prompt(sample)
        if not sample.images:
            return prompt
        if self._placeholder is None:
            self._placeholder = self._find_placeholder(prompt, sample.images[0])
        if self._placeholder and self._placeholder not in prompt:
            return f"{self._placeholder * len(sample.images)}\n{prompt}"
        return prompt

    def render_answered(self, sample: Sample) -> str:
        """The same text, the answer ``sample.text`` and its end: the template's own, else the end token."""
        prompt, answer = self.render(sample), (sample.text or "").strip()
        joined = prompt + ("" if not prompt or prompt[-1].isspace() else " ") + answer
        if self._chat:
            turns = [*turns_of(sample, parts=self._parts), answer_turn(answer, parts=self._parts)]
            whole = self._template(turns).rstrip()
            if whole.startswith(prompt.rstrip()) and whole[len(prompt.rstrip()) :].lstrip().startswith(answer):
                joined = whole  # else the template has no turns of an assistant
        end = getattr(self.tokenizer, "eos_token", None)
        closed = not joined.endswith(answer)  # a template may end the turn with its own token
        return joined if closed or not end or self._ends(joined) else joined + str(end)

    def _template(self, turns: list[dict[str, Any]], **options: Any) -> str:
        try:
            return str(self.processor.apply_chat_template(turns, tokenize=False, **options))
        except Exception as error:  # a template is code: it, or its sandbox, may raise any error
            raise CalibrationError(
                f"the chat template of the model can't be used ({type(error).__name__}: {first_line(error)}): check "
                "chat_template in its tokenizer_config.json, or chat_template.jinja beside it"
            ) from error

    def _ends(self, text: str) -> bool:
        assert self.tokenizer is not None
        return bool(self.token_ids(text)[-1:] == [self.tokenizer.eos_token_id])

    def _find_placeholder(self, prompt: str, image: Image.Image) -> str:
        """The text before the prompt that marks the image; "" if the processor inserts it itself."""
        identifier = image_token_id(self._model, self.processor)
        if identifier is None:
            return ""  # the image is not part of the text (cross-attention)
        assert self.tokenizer is not None
        placeholder = str(
            getattr(self.processor, "image_token", "") or self.tokenizer.convert_ids_to_tokens(identifier)
        )
        for candidate in ("", placeholder):
            text = f"{candidate}\n{prompt}" if candidate else prompt
            try:
                count = int((self._encode([text], [(image,)])["input_ids"] == identifier).sum())
            except (ValueError, IndexError, RuntimeError, StopIteration):
                continue  # processors refuse an image that the text does not mark
            queries = getattr(self._model.config, "num_query_tokens", None)
            if count and isinstance(queries, int) and count != queries:
                break
            if count:
                return candidate
        raise CalibrationError(
            "the processor does not put the image placeholder tokens that the model needs into the text: check "
            "num_query_tokens, image_token and patch_size in its processor_config.json"
        )

    def encode(
        self, texts: Sequence[str], images: Sequence[Sequence[Image.Image]], side: str = "right", **more: Any
    ) -> dict[str, Any]:
        """Tensors for rendered ``texts`` and the images of each, padded on ``side`` to the longest of the batch.

        Args:
            more: passed on to the processor.
        """
        with using_processor():
            return self._encode(texts, images, side, **more)

    def _encode(
        self, texts: Sequence[str], images: Sequence[Sequence[Image.Image]], side: str = "right", **more: Any
    ) -> dict[str, Any]:
        options: dict[str, Any] = {"padding": True, "padding_side": side, "return_tensors": "pt", **more}
        bos = getattr(self.tokenizer, "bos_token", None)
        if self._chat and bos and all(text.startswith(bos) for text in texts):
            options["add_special_tokens"] = False  # the template has added them
        with padding_token(self.tokenizer), padded_on(self.tokenizer, side), quiet():
            if any(images):
                encoded = dict(self.processor(images=[list(each) for each in images], text=list(texts), **options))
            else:
                assert self.tokenizer is not None
                encoded = dict(self.tokenizer(list(texts), **options))
        if "suffix" not in more:
            encoded.pop("labels", None)  # some processors add their own
        if "token_type_ids" not in parameters_of(self._model):
            encoded.pop("token_type_ids", None)
        return encoded

    def encode_suffixes(
        self, prompts: Sequence[str], answers: Sequence[str], images: Sequence[Sequence[Image.Image]]
    ) -> dict[str, Any]:
        """As :meth:`encode` with separate answers; ``labels`` are -100 except on the answers and their ends."""
        return self.encode(prompts, images, suffix=list(answers))

    def token_ids(self, text: str) -> list[int]:
        """Tokens of a rendered text without its image, with the special tokens that :meth:`encode` adds."""
        with using_processor():
            return self._token_ids(text)

    def _token_ids(self, text: str) -> list[int]:
        assert self.tokenizer is not None
        bos = getattr(self.tokenizer, "bos_token", None)
        special = not (self._chat and bos and text.startswith(bos))
        return list(self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
