"""Captioning: generates a caption for each image and scores it by CIDEr and SPICE against human captions.

Sources: CIDEr, Vedantam et al., CVPR 2015; SPICE, Anderson et al., ECCV 2016. The package ``pycocoevalcap`` computes
both with two Java programs: Stanford's PTB tokenizer (its jar is in the package) and SPICE (the package downloads its
language models once). Both are checked before any caption is generated.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
from torch import nn

from ecoflap.data.prompts import Prompter, image_processor_of
from ecoflap.data.sample import Sample
from ecoflap.errors import InvalidOption, MissingDependency
from ecoflap.evaluation.generate import generate
from ecoflap.evaluation.task import (
    Shared,
    Task,
    TaskResult,
    TestData,
    Unit,
    captions_of,
    common_settings,
    in_chunks,
    measured,
    open_data,
    pictures,
)
from ecoflap.model.trace import evaluating
from ecoflap.support.registry import unknown

Tokenize = Callable[[list[list[str]]], list[list[str]]]
METRICS = ("CIDEr", "SPICE")
TOKENIZERS = ("ptb", "simple")
INSTALL = "pip install 'ecoflap[captions]'"


def wanted(metrics: str) -> list[str]:
    """Metric names from "CIDEr,SPICE", in any case.

    Raises:
        UnknownName: none of :data:`METRICS`.
    """
    known = {metric.lower(): metric for metric in METRICS}
    names = [name.strip() for name in metrics.split(",") if name.strip()]
    for name in names:
        if name.lower() not in known:
            raise unknown("caption metric", name, list(METRICS))
    if not names:
        raise InvalidOption(f"metrics is empty: choose from {', '.join(METRICS)}")
    return [metric for metric in METRICS if metric.lower() in {name.lower() for name in names}]


def check(metrics: Sequence[str], tokenizer: str) -> None:
    """Check that these metrics can be computed here; the package downloads SPICE's models if necessary.

    Raises:
        UnknownName: no such tokenizer.
        MissingDependency: the package, Java or SPICE's models are missing.
    """
    if tokenizer not in TOKENIZERS:
        raise unknown("tokenizer", tokenizer, list(TOKENIZERS))
    if not has_package():
        raise MissingDependency(f"task 'captioning' needs the package pycocoevalcap: {INSTALL}")
    java = shutil.which("java") is not None
    if "SPICE" in metrics:
        if not java:
            raise MissingDependency(
                "SPICE needs Java, and there is no program 'java': install it (SPICE was written for Java 8), or "
                "give --task-option metrics=CIDEr"
            )
        _spice()
    if tokenizer == "ptb" and not java:
        raise MissingDependency(
            "the PTB tokenizer needs Java, and there is no program 'java': install it (Debian: default-jre-headless), "
            "or give --task-option tokenizer=simple, whose CIDEr can't be compared with published values"
        )


def has_package() -> bool:
    """Whether pycocoevalcap is installed."""
    return find_spec("pycocoevalcap") is not None


def simple_words(captions: list[list[str]]) -> list[list[str]]:
    """Each caption as lower-case words of letters and digits, separated by one space; needs no Java."""
    return [[" ".join(re.findall(r"\w+", caption.lower())) for caption in of_one] for of_one in captions]


def ptb(captions: list[list[str]]) -> list[list[str]]:
    """Each caption as Penn Treebank tokens, as in the COCO evaluation: lower case, without punctuation.

    Raises:
        MissingDependency: the Java program failed.
    """
    tokenizer = import_module("pycocoevalcap.tokenizer.ptbtokenizer").PTBTokenizer()
    # Each caption is one line of the program's input. A full stop, which is dropped later, keeps empty ones.
    lines = {i: [{"caption": " ".join(c.split()) or "."} for c in of_one] for i, of_one in enumerate(captions)}
    with java_program("the PTB tokenizer of pycocoevalcap", "tokenizer=simple"):
        words: dict[int, list[str]] = tokenizer.tokenize(lines)
        if [len(words.get(i, ())) for i in range(len(captions))] != [len(of_one) for of_one in captions]:
            raise OSError("it gave another number of captions back")
    return [words[i] for i in range(len(captions))]


def tokenize_with(name: str) -> Tokenize:
    """The function behind a name of :data:`TOKENIZERS`."""
    return {"ptb": ptb, "simple": simple_words}[name]


def cider(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr(-D) of each tokenised candidate against its tokenised references, 0..10.

    Words are weighted by their rarity in the references of all images, so an image's score depends on the others.
    """
    scorer: Any = import_module("pycocoevalcap.cider.cider").Cider()
    truth = {i: list(of_one) for i, of_one in enumerate(references)}
    _, scores = scorer.compute_score(truth, {i: [said] for i, said in enumerate(candidates)})
    return [float(score) for score in scores]


def spice(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """SPICE's F-score of each tokenised candidate against its tokenised references, 0..1.

    Raises:
        MissingDependency: its models are missing, or the Java program failed.
    """
    scorer = _spice()
    truth = {i: list(of_one) for i, of_one in enumerate(references)}
    with java_program("SPICE", "metrics=CIDEr"):
        _, scores = scorer.compute_score(truth, {i: [said] for i, said in enumerate(candidates)})
    return [float(score["All"]["f"]) for score in scores]


def _spice() -> Any:
    """SPICE; the package downloads its models if they are missing."""
    module = import_module("pycocoevalcap.spice.spice")
    folder = os.path.join(os.path.dirname(str(module.__file__)), "lib")
    try:
        with redirect_stdout(sys.stderr):
            return module.Spice()
    except OSError as error:  # URLError is one
        reason = getattr(error, "reason", None) or error
        raise MissingDependency(
            f"SPICE needs the models of Stanford CoreNLP 3.6.0, and pycocoevalcap can't download them ({reason}): put "
            f"stanford-corenlp-3.6.0.jar and stanford-corenlp-3.6.0-models.jar into {folder}, or give --task-option "
            "metrics=CIDEr"
        ) from error


@contextmanager
def java_program(name: str, way_out: str) -> Iterator[None]:
    """Context for a Java program of the package; its standard error goes into the message of an error."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as heard:
        saved = os.dup(2)
        os.dup2(heard.fileno(), 2)
        try:
            yield
        except Exception as error:  # the package raises many kinds: OSError, CalledProcessError, ...
            heard.seek(0)
            lines = [line.strip() for line in heard.read().decode(errors="replace").splitlines() if line.strip()]
            why = next((line for line in lines if "rror" in line or "xception" in line), str(error) or repr(error))
            raise MissingDependency(f"{name} failed ({why}): repair Java, or give --task-option {way_out}") from error
        finally:
            sys.stderr.flush()
            os.dup2(saved, 2)
            os.close(saved)


MAX_NEW_TOKENS = 30  # of a caption: BLIP-2's published setting for COCO
CHAT_PROMPT = "Describe the image in one short sentence."  # for chat models; others need no prompt


@dataclass
class _Picture:
    """An image's row, its references, and the model's caption."""

    index: int
    references: list[str]
    said: str = ""


@dataclass(frozen=True)
class Captioning(Task):
    """CIDEr (0..10) and SPICE (0..1) of the model's captions, each the mean over images.

    Standard errors are over images, with CIDEr's word weights as constants. If several rows have the same image
    (``Sample.group``), it is captioned once, and all their captions are its references.

    Data: images with one or several captions each.

    Attributes:
        prompt: text that the caption continues or answers ("a photo of"); by default the data's prompt, if any, and for
            a chat model "Describe the image in one short sentence."
        beams, length_penalty, min_tokens, new_tokens: as in :func:`ecoflap.evaluation.generate.generate`. A caption is
            the first line of the output.
        metrics: ``CIDEr``, ``SPICE`` or both, separated by a comma; the first of this order is the result's value.
        tokenizer: ``ptb``, the COCO evaluation's, in Java; or ``simple``, lower-case words without Java, whose results
            are labelled, since they can't be compared with published values.
    """

    unit: ClassVar[Unit] = "points"
    hub_type: ClassVar[str] = "image-to-text"
    takes: ClassVar[tuple[str, ...]] = ("columns", "image_folder")
    needs_pictures: ClassVar[bool] = True

    prompt: str | None = None
    beams: int = 1
    length_penalty: float = 1.0
    min_tokens: int = 0
    new_tokens: int = MAX_NEW_TOKENS
    metrics: str = "CIDEr,SPICE"
    tokenizer: str = "ptb"

    @torch.no_grad()
    def run(self, model: nn.Module, processor: Any, test: TestData) -> TaskResult:
        """As :meth:`Task.run`.

        Raises:
            InvalidOption: the model cannot generate or has no image processor.
            MissingDependency: the extra ``captions``, Java or SPICE's models are missing.
            CalibrationError: there are no images, or no captions.
        """
        names = wanted(self.metrics)
        if not callable(getattr(model, "generate", None)) or image_processor_of(processor) is None:
            raise InvalidOption("task 'captioning' needs a model that generates text from images, and its processor")
        reader = open_data("captioning", test)
        check(names, self.tokenizer)
        prompter = Prompter(model, processor)
        decoding: dict[str, Any] = {
            "new_tokens": self.new_tokens,
            "beams": self.beams,
            "length_penalty": self.length_penalty,
            "min_tokens": self.min_tokens,
        }
        found: dict[str, _Picture] = {}
        collected: Shared[list[str]] = Shared(test.workers)
        with evaluating(model):
            for part in in_chunks(reader, test.batch_size, test.progress, "captioning"):
                pictures(part, "captioning", reader.source)
                fresh: list[tuple[_Picture, Sample]] = []
                for index, sample in part:
                    key = f"row {index}" if sample.group is None else f"group {sample.group}"
                    if key not in found:
                        found[key] = _Picture(index, [])
                        fresh.append((found[key], replace(sample, prompt=_prompt(self.prompt, sample, prompter))))
                    found[key].references += captions_of(index, sample, "captioning", reader.source)
                asked = [sample for _, sample in fresh]
                collected.add(partial(generate, model, prompter, asked, limit=test.sequence_length, **decoding))
        shown = list(found.values())
        for picture, text in zip(shown, (text for of_part in collected.all() for text in of_part), strict=True):
            picture.said = text.partition("\n")[0].strip()
        scores = _scores(names, self.tokenizer, shown)
        values = {_label(name, self.tokenizer): measured(of_all) for name, of_all in scores.items()}
        first, *others = values
        predictions = [
            {"index": p.index, "prediction": p.said, "truth": p.references}
            | {"score" if i == 0 else name: of_all[row] for i, (name, of_all) in enumerate(scores.items())}
            for row, p in enumerate(shown)
        ]
        settings = common_settings(reader, test, prompt=self.prompt, **decoding, tokenizer=self.tokenizer)
        return TaskResult(
            "captioning",
            first,
            values[first].value,
            values[first].stderr,
            len(shown),
            settings,
            predictions=predictions,
            others={name: values[name] for name in others},
        )


def _prompt(given: str | None, sample: Sample, prompter: Prompter) -> str:
    if given is not None:
        return given
    return sample.prompt or (CHAT_PROMPT if prompter.is_chat else "")


def _label(metric: str, tokenizer: str) -> str:
    return metric if tokenizer == "ptb" else f"{metric} ({tokenizer} words)"


def _scores(names: list[str], tokenizer: str, shown: list[_Picture]) -> dict[str, list[float]]:
    tokenize = tokenize_with(tokenizer)
    said = [of_one[0] for of_one in tokenize([[picture.said] for picture in shown])]
    truth = tokenize([picture.references for picture in shown])
    functions = {"CIDEr": cider, "SPICE": spice}
    return {name: functions[name](said, truth) for name in names}
