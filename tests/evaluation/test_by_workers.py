"""Every task by several workers: the result of one, to the bit."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import choices
import pairs
import pico
import picos
import pytest
import test_answer_perplexity
import test_captioning
import test_image_classification
import test_knn
import test_multiple_choice
import test_nlvr2
import test_perplexity
import test_retrieval
import test_vqa_task
import test_zero_shot
from tasks import run_task
from together import together

from ecoflap.support.workers import Workers

Run = Callable[..., Any]


def llava() -> tuple[Any, Any]:
    """The same weights in every thread: a model's own initial ones come from the generator that all threads share."""
    model, processor = pico.llava(chat=False)
    return picos.scramble(model), processor


def vqa(folder: Path) -> Run:
    data = test_vqa_task.questions_file(folder, ["red", "circle", "no", "two", "star"])
    return lambda **options: test_vqa_task.run(*llava(), data, batch_size=1, **options)


def answer_perplexity(folder: Path) -> Run:
    data = test_vqa_task.questions_file(folder, ["red", "circle", "no", "two", "star"])
    return lambda **options: test_answer_perplexity.run(*llava(), data, batch_size=1, **options)


def captioning(folder: Path) -> Run:
    data = test_captioning.captions_file(folder)
    return lambda **options: test_captioning.run(*pairs.blip("captions"), data, new_tokens=5, **options)


def retrieval(folder: Path) -> Run:
    data = test_retrieval.captions_file(folder)
    return lambda **options: test_retrieval.run(*test_retrieval.clip(), data, batch_size=3, **options)


def reranked(folder: Path) -> Run:
    data = test_retrieval.captions_file(folder)
    return lambda **options: test_retrieval.run(*pairs.blip("retrieval"), data, batch_size=3, rerank=4, **options)


def zero_shot(folder: Path) -> Run:
    rows = [{"image": pairs.picture_file(folder, i), "label": test_zero_shot.CLASSES[i % 7]} for i in range(9)]
    data = pairs.write_rows(folder, rows)
    return lambda **options: run_task(
        "zero-shot", *test_zero_shot.clip(), data=data, samples=None, batch_size=2, **options
    )


def image_classification(folder: Path) -> Run:
    data = test_image_classification.rows_file(folder, [test_image_classification.CLASSES[i % 7] for i in range(9)])
    return lambda **options: test_image_classification.run(
        *test_image_classification.vit(), data, **{"batch_size": 2, **options}
    )


def knn(folder: Path) -> Run:
    train, data = (test_knn.rows_file(folder, of, f"{of.start}.jsonl") for of in (test_knn.TRAIN, test_knn.TEST))
    return lambda **options: run_task("knn", test_knn.dinov2(), pico.vit(test_knn.CLASSES)[1], data=data, samples=None,
        batch_size=4, train=str(train), k=5, **options,
    )  # fmt: skip


def nlvr2(folder: Path) -> Run:
    data = test_nlvr2.nlvr2_file(folder)
    return lambda **options: test_nlvr2.run(*llava(), data, **options)


def perplexity(folder: Path) -> Run:
    data = test_perplexity.prose(folder)

    def run(**options: Any) -> Any:
        words = pico.tokenizer(pad=False, bos=True)
        return test_perplexity.run(picos.scramble(pico.llama(len(words))), words, data, batch_size=2, **options)

    return run


def multiple_choice(folder: Path) -> Run:
    data = choices.questions(folder / "questions.jsonl", 40)
    return lambda **options: test_multiple_choice.run(
        choices.llama(positions=60), choices.tokenizer.__wrapped__(), data, shots=2, style="text", **options
    )


@pytest.mark.parametrize(
    "task",
    [
        vqa,
        answer_perplexity,
        captioning,
        retrieval,
        reranked,
        zero_shot,
        image_classification,
        knn,
        nlvr2,
        perplexity,
        multiple_choice,
    ],
)
def test_the_result_is_that_of_one_worker(task: Callable[[Path], Run], tmp_path: Path) -> None:
    run = task(tmp_path)

    def measured(workers: Workers) -> dict[str, Any]:
        return asdict(run(workers=workers))

    one = together(1, measured)[0]
    assert together(3, measured) == [one] * 3
    assert one["n"] > 1
