"""lm-eval's view of a model in memory: its wrappers with our progress, and pictures where a request has them.

Imported only where lm-eval is installed.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable, Iterator
from typing import Any

from lm_eval.models.hf_vlms import HFMultimodalLM
from lm_eval.models.huggingface import HFLM
from torch import nn

from ecoflap.calibration.models import is_encoder_decoder
from ecoflap.calibration.prompts import image_processor_of, tokenizer_of
from ecoflap.progress import Progress, Task


class Screen:
    """Keeps lm-eval's own bars from the terminal, and shows ours while it asks the model."""

    def __init__(self, name: str, progress: Progress) -> None:
        self._name, self._progress, self._error = name, progress, sys.stderr
        self._stage: Task | None = None

    @contextlib.contextmanager
    def silenced(self) -> Iterator[None]:
        self._error = sys.stderr
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield

    def asked(self, method: Callable[..., Any], requests: list[Any]) -> Any:
        """What ``method`` answers to ``requests``, with a bar."""
        with contextlib.redirect_stderr(self._error), self._progress.stage(self._name, len(requests)) as self._stage:
            return method(requests, disable_tqdm=True)

    def advance(self, rows: int) -> None:
        if self._stage is not None:
            self._stage.advance(rows)


class _Shown(HFLM):  # type: ignore[misc]
    """Counts what goes through the model."""

    screen: Screen

    def _model_call(self, inps: Any, *args: Any, **kwargs: Any) -> Any:
        logits = super()._model_call(inps, *args, **kwargs)
        self.screen.advance(len(inps))
        return logits

    def _model_generate(self, context: Any, *args: Any, **kwargs: Any) -> Any:
        output = super()._model_generate(context, *args, **kwargs)
        self.screen.advance(len(context))
        return output


class TextModel(_Shown):
    """A language model."""

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        return self.screen.asked(super().loglikelihood, requests)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        return self.screen.asked(super().loglikelihood_rolling, requests)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        return self.screen.asked(super().generate_until, requests)


class SeeingModel(HFMultimodalLM):  # type: ignore[misc]
    """A vision-language model; requests of text alone (without a third argument) go the way of language models."""

    screen: Screen

    def __init__(self, processor: Any, **options: Any) -> None:
        self._ours = processor
        super().__init__(**options)

    def _create_tokenizer(self, *args: Any, **kwargs: Any) -> None:
        self.processor, self.tokenizer = self._ours, tokenizer_of(self._ours)

    def _way(self, name: str, requests: list[Any]) -> Callable[..., Any]:
        seen = not requests or len(requests[0].args) > 2
        owner = HFMultimodalLM if seen else HFLM
        return getattr(owner, name).__get__(self)  # type: ignore[no-any-return]

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        return self.screen.asked(self._way("loglikelihood", requests), requests)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        return self.screen.asked(HFLM.loglikelihood_rolling.__get__(self), requests)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        return self.screen.asked(self._way("generate_until", requests), requests)


def judged(model: nn.Module, processor: Any, *, batch_size: int, length: int | None, screen: Screen) -> HFLM:
    """The model as lm-eval wants it."""
    options: dict[str, Any] = {
        "pretrained": model,
        "backend": "seq2seq" if is_encoder_decoder(model) else "causal",
        "batch_size": batch_size,
        "max_length": length,
    }
    sees = image_processor_of(processor) is not None
    found = SeeingModel(processor, **options) if sees else TextModel(tokenizer=tokenizer_of(processor), **options)
    found.screen = screen
    return found
