"""A tokenizer or chat template that fails ends in one line that names it."""

from __future__ import annotations

import picos
import pytest

from ecoflap.data.packing import tokenize_corpus
from ecoflap.data.prompts import Prompter
from ecoflap.data.sample import Sample
from ecoflap.data.samples import SampleSet
from ecoflap.errors import CalibrationError

SAMPLE = Sample(prompt="what color is it ?", text="red")


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
        ("{{ messages[7].content }}", "UndefinedError"),
        ("{% for m in messages %}", "TemplateSyntaxError"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ raise_exception('only pairs') }}", "only pairs"),
    ],
)
def test_a_template_that_fails_is_named(template: str, words: str) -> None:
    tokenizer = picos.tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(CalibrationError, match=f"the chat template of the model can't be used .*{words}") as caught:
        Prompter(picos.llama(tied=False), tokenizer).render(SAMPLE)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("length", [{}, "x", None, [5]])
def test_a_tokenizer_with_settings_of_other_types_is_named(length: object) -> None:
    tokenizer = picos.tokenizer()
    tokenizer.model_max_length = length
    text = SampleSet((SAMPLE,), (0,), 0, "prose.txt", {}, windows=1)
    for read in (lambda: tokenize_corpus(text, tokenizer), lambda: Prompter(None, tokenizer).token_ids("red")):
        with pytest.raises(CalibrationError, match="tokenizer or processor can't read the data"):
            read()
