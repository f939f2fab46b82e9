import math
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pairs
import pico
import pytest
from tasks import run_task

from ecoflap.data.prompts import Prompter
from ecoflap.data.sample import Sample
from ecoflap.errors import CalibrationError, InvalidOption, MissingDependency, UnknownName
from ecoflap.evaluation import captioning
from ecoflap.evaluation.generate import generate
from ecoflap.evaluation.task import mean_and_stderr

has_package = pytest.mark.skipif(not captioning.has_package(), reason="pycocoevalcap is not installed")
has_java = pytest.mark.skipif(shutil.which("java") is None, reason="there is no Java here")


def ngrams(text: str, n: int) -> Counter[tuple[str, ...]]:
    words = text.split()
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def cider_by_formula(candidates: list[str], references: list[list[str]]) -> list[float]:
    """CIDEr-D from its definition: clipped cosines of tf-idf vectors of 1- to 4-grams, a Gaussian of the lengths."""
    pictures = len(references)
    result = []
    for said, truths in zip(candidates, references, strict=True):
        total = 0.0
        for n in (1, 2, 3, 4):
            df = Counter(gram for of_one in references for gram in {g for truth in of_one for g in ngrams(truth, n)})

            def weights(text: str, n: int = n, df: Counter[Any] = df) -> dict[Any, float]:
                return {g: k * math.log(pictures / max(1, df[g])) for g, k in ngrams(text, n).items()}

            hypothesis = weights(said)
            for truth in truths:
                reference = weights(truth)
                norms = math.hypot(*hypothesis.values()) * math.hypot(*reference.values())
                dot = sum(min(w, reference.get(g, 0.0)) * reference.get(g, 0.0) for g, w in hypothesis.items())
                # The package takes the number of bigrams for the length; the difference is that of the words.
                gap = sum(ngrams(said, 2).values()) - sum(ngrams(truth, 2).values())
                total += (dot / norms if norms else 0.0) * math.exp(-(gap**2) / (2 * 6.0**2)) / 4 / len(truths)
        result.append(10 * total)
    return result


@has_package
def test_cider_against_its_formula() -> None:
    chance = random.Random(0)
    vocabulary = ["a", "dog", "cat", "man", "runs", "sits", "on", "the", "grass", "red", "ball", "with", "and"]

    def text() -> str:
        return " ".join(chance.choices(vocabulary, k=chance.randint(1, 12)))

    references = [[text() for _ in range(chance.randint(1, 5))] for _ in range(12)]
    candidates = [chance.choice([text(), truths[0], truths[-1] + " a"]) for truths in references]
    scores = captioning.cider(candidates, references)
    assert scores == pytest.approx(cider_by_formula(candidates, references))
    assert min(scores) < 1 < max(scores)


def test_simple_words() -> None:
    assert captioning.simple_words([["A dog, two cats.", ""], [" It's\nRED "]]) == [
        ["a dog two cats", ""],
        ["it s red"],
    ]


@has_package
@has_java
def test_ptb_tokens_by_the_package(capfd: pytest.CaptureFixture[str]) -> None:
    words = captioning.ptb([["A dog, two cats.", "It isn't\nred!"], [""], ["one", ""]])
    assert words == [["a dog two cats", "it is n't red"], [""], ["one", ""]]
    assert capfd.readouterr().err == ""


def captions_file(folder: Path) -> Path:
    """Five pictures, three captions each, one in two rows of the same picture."""
    said = pairs.texts(15)
    rows = [
        {"image": pairs.picture_file(folder, i), "captions": said[3 * i : 3 * i + 3], "image_id": i} for i in range(5)
    ]
    rows[4:] = [rows[4] | {"captions": said[12:14]}, rows[4] | {"captions": said[14:]}]
    return pairs.write_rows(folder, rows)


def run(model: Any, processor: Any, data: Path | None, **options: Any) -> Any:
    settings = {"samples": None, "batch_size": 2, "metrics": "cider", "tokenizer": "simple", **options}
    return run_task("captioning", model, processor, data=data, **settings)


@has_package
@pytest.mark.parametrize("name", ["blip", "llava-chat"])
def test_captions_and_their_score(name: str, tmp_path: Path) -> None:
    model, processor = pairs.blip("captions") if name == "blip" else pico.llava(chat=True)
    model.train()
    result = run(model, processor, captions_file(tmp_path), prompt="a picture of", beams=2, new_tokens=5)
    assert model.training
    model.eval()
    prompter = Prompter(model, processor)
    wanted = [
        generate(model, prompter, [Sample((pico.picture(i),), "a picture of")], new_tokens=5, beams=2)[0]
        for i in range(5)
    ]
    truth = [pairs.texts(15)[3 * i : 3 * i + 3] for i in range(5)]
    assert [r["prediction"] for r in result.predictions] == wanted
    assert [r["truth"] for r in result.predictions] == truth
    scores = cider_by_formula(wanted, truth)
    assert (result.value, result.stderr) == pytest.approx(mean_and_stderr(scores))
    assert (result.metric, result.n, result.others) == ("CIDEr (simple words)", 5, {})
    assert {"beams": 2, "tokenizer": "simple", "prompt": "a picture of"}.items() <= result.settings.items()


@has_package
def test_a_chat_is_asked_and_others_begin_by_themselves(tmp_path: Path) -> None:
    data = captions_file(tmp_path)
    asked = {"blip": "", "chat": "Describe the image in one short sentence."}
    for name, (model, processor) in {"blip": pairs.blip("captions"), "chat": pico.llava(chat=True)}.items():
        default, given = (run(model, processor, data, new_tokens=5, **o) for o in ({}, {"prompt": asked[name]}))
        assert [r["prediction"] for r in default.predictions] == [r["prediction"] for r in given.predictions]


@has_package
@has_java
def test_published_tokens_and_their_label(tmp_path: Path) -> None:
    model, processor = pairs.blip("captions")
    result = run(model, processor, captions_file(tmp_path), tokenizer="ptb", new_tokens=5)
    said = [r["prediction"] for r in result.predictions]
    truth = [r["truth"] for r in result.predictions]
    assert result.metric == "CIDEr"
    assert result.value == pytest.approx(mean_and_stderr(cider_by_formula(said, truth))[0])  # plain words stay


def test_both_metrics_and_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = pairs.blip("captions")
    monkeypatch.setattr(captioning, "check", lambda metrics, tokenizer: None)
    monkeypatch.setattr(captioning, "cider", lambda said, truth: [float(i) for i in range(len(said))])
    monkeypatch.setattr(captioning, "spice", lambda said, truth: [0.1 * len(of_one) for of_one in truth])
    result = run(model, processor, captions_file(tmp_path), metrics="spice, CIDEr", new_tokens=3)
    assert (result.metric, result.value) == ("CIDEr (simple words)", 2.0)
    assert result.others["SPICE (simple words)"].value == pytest.approx(0.3)
    assert [r["score"] for r in result.predictions] == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_what_is_missing_is_said_before_captions_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = pairs.blip("captions")
    data = captions_file(tmp_path)
    monkeypatch.setattr(type(model), "generate", lambda *args, **options: pytest.fail("a caption was made"))
    with pytest.raises(UnknownName, match="SPICE"):
        run(model, processor, data, metrics="spise")
    with pytest.raises(UnknownName, match="simple"):
        run(model, processor, data, metrics="CIDEr", tokenizer="simpel")
    with pytest.raises(InvalidOption, match="--test"):
        run(model, processor, None)
    with pytest.raises(InvalidOption, match="generates text"):
        run(*pico.clip(), data)
    monkeypatch.setattr(captioning, "has_package", lambda: True)
    monkeypatch.setattr(captioning.shutil, "which", lambda name: None)
    with pytest.raises(MissingDependency, match=r"needs Java.*tokenizer=simple"):
        run(model, processor, data, tokenizer="ptb")
    with pytest.raises(MissingDependency, match=r"needs Java.*metrics=CIDEr"):
        run(model, processor, data, metrics="SPICE")
    monkeypatch.setattr(captioning, "has_package", lambda: False)
    with pytest.raises(MissingDependency, match=r"pip install 'ecoflap\[captions\]'"):
        run(model, processor, data)


@has_package
def test_spice_without_its_models(monkeypatch: pytest.MonkeyPatch) -> None:
    from pycocoevalcap.spice import spice

    def refuse() -> None:
        raise OSError("no route")

    monkeypatch.setattr(spice, "get_stanford_models", refuse)
    monkeypatch.setattr(captioning.shutil, "which", lambda name: "/usr/bin/java")
    with pytest.raises(MissingDependency, match=r"can't download them.*no route.*metrics=CIDEr") as caught:
        captioning.check(["SPICE"], "simple")
    assert "\n" not in str(caught.value)


def test_a_failing_program_is_told_in_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    code = "import sys; print('Loading', file=sys.stderr); sys.exit('java.lang.OutOfMemoryError: heap')"
    found = r"^SPICE failed \(java.lang.OutOfMemoryError: heap\): repair Java, or give --task-option metrics=CIDEr$"
    with pytest.raises(MissingDependency, match=found), captioning.java_program("SPICE", "metrics=CIDEr"):
        subprocess.check_call([sys.executable, "-c", code])
    assert capfd.readouterr().err == ""


@has_package
def test_pictures_without_captions(tmp_path: Path) -> None:
    rows = [{"image": pairs.picture_file(tmp_path, i)} for i in range(2)]
    with pytest.raises(CalibrationError, match="no caption in row 0"):
        run(*pairs.blip("captions"), pairs.write_rows(tmp_path, rows))
