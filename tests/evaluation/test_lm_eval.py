"""Suites of lm-eval: our multiple choice judged by lm-eval on the same questions, its results as ours, its refusals."""

from __future__ import annotations

import json
import math
import random
import statistics
from pathlib import Path
from typing import Any

import choices
import numpy as np
import pico
import pytest
import torch
import yaml
from tasks import run_task

from ecoflap.errors import CalibrationError, InvalidOption, MissingDependency, UnknownName
from ecoflap.evaluation.lm_eval import result_of
from ecoflap.evaluation.paired import Samples, paired

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'ecoflap[lm-eval]'")

DESCRIPTION = "The following are multiple choice questions (with answers) about anatomy.\n\n"
LETTERED = "{{question.strip()}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\nD. {{choices[3]}}\nAnswer:"


def task_file(folder: Path, name: str, data: Path, dev: Path, **fields: Any) -> None:
    """A task of lm-eval's own format on local files."""
    folder.mkdir(exist_ok=True)
    config = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data), "dev": str(dev)}},
        "test_split": "test",
        "fewshot_split": "dev",
        "fewshot_config": {"sampler": "first_n"},
        "output_type": "multiple_choice",
        "doc_to_target": "answer",
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
        ],
        "metadata": {"version": 7},
        **fields,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(config), "utf-8")


def suite(name: str, model: Any, processor: Any, folder: Path, **options: Any) -> Any:
    return run_task(
        f"lm_eval:{name}", model, processor, data=None, samples=None, batch_size=3, include_path=str(folder), **options
    )


def their_loglikelihoods(name: str, model: Any, folder: Path, shots: int) -> list[list[float]]:
    """What lm-eval gives each choice, question by question, asked without any code of ours."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    backend = "seq2seq" if model.config.is_encoder_decoder else "causal"
    judge = HFLM(pretrained=model, tokenizer=choices.tokenizer(), backend=backend, batch_size=2)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = simple_evaluate(judge, tasks=[name], num_fewshot=shots, task_manager=manager, bootstrap_iters=0)
    samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
    return [[float(pair[0][0]) for pair in sample["resps"]] for sample in samples]


@pytest.fixture
def data(tmp_path: Path) -> tuple[Path, Path]:
    """Questions on one subject, as lm-eval's tasks of MMLU have them."""
    files = []
    for number, name in enumerate(("test", "dev")):
        path = choices.questions(tmp_path / f"{name}.jsonl", count=10, seed=number)
        rows = [{**row, "subject": "anatomy"} for row in choices.read(path)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        files.append(path)
    return files[0], files[1]


@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize("shots", [0, 3])
def test_our_letters_are_theirs(kind: str, shots: int, data: tuple[Path, Path], tmp_path: Path) -> None:
    model = getattr(choices, kind)(seed=1)
    task_file(
        tmp_path / "tasks", "letters", *data,
        description=DESCRIPTION, doc_to_text=LETTERED, doc_to_choice=["A", "B", "C", "D"],
    )  # fmt: skip
    ours = run_task(
        "multiple-choice",
        model,
        choices.tokenizer(),
        data=data[0],
        samples=None,
        batch_size=4,
        shots=shots,
        shots_source=str(data[1]),
    )
    theirs = suite("letters", model, choices.tokenizer(), tmp_path / "tasks", num_fewshot=shots)
    assert (ours.value, ours.n) == (theirs.value, theirs.n)
    assert ours.stderr == pytest.approx(theirs.stderr, rel=1e-6)
    expected = their_loglikelihoods("letters", model, tmp_path / "tasks", shots)
    for record, row in zip(ours.predictions, expected, strict=True):
        assert record["loglikelihoods"] == pytest.approx(row, abs=1e-4)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_our_texts_are_theirs(kind: str, data: tuple[Path, Path], tmp_path: Path) -> None:
    model = getattr(choices, kind)(seed=2)
    template = "Question: {{question}}\nAnswer:"
    task_file(tmp_path / "tasks", "texts", *data, doc_to_text=template, doc_to_choice="choices")
    ours = run_task(
        "multiple-choice", model, choices.tokenizer(), data=data[0], samples=None, batch_size=4, style="text"
    )
    theirs = suite("texts", model, choices.tokenizer(), tmp_path / "tasks")
    assert (theirs.task, theirs.metric) == ("lm_eval:texts", "accuracy")
    assert ours.value == theirs.value
    assert ours.others["acc_norm"].value == theirs.others["acc_norm"].value
    assert ours.others["acc_norm"].stderr == pytest.approx(theirs.others["acc_norm"].stderr, rel=1e-6)
    for record, row in zip(ours.predictions, their_loglikelihoods("texts", model, tmp_path / "tasks", 0), strict=True):
        assert record["loglikelihoods"] == pytest.approx(row, abs=1e-4)
    assert theirs.settings["version"] == 7
    assert theirs.settings["num_fewshot"] == 0


class Recorder:
    """Progress that keeps what it is told."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, int]] = []
        self.steps = 0

    def stage(self, name: str, total: int, done: int = 0) -> Any:
        self.stages.append((name, total))
        return self

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def advance(self, steps: int = 1, detail: str = "") -> None:
        self.steps += steps


def test_a_run_is_quiet_counted_and_leaves_the_generators_alone(
    data: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # no git repository
    task_file(tmp_path / "tasks", "texts", *data, doc_to_text="{{question}}", doc_to_choice="choices")
    model, seen = choices.llama().train(), Recorder()
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state()
    result = run_task("lm_eval:texts", model, choices.tokenizer(), data=None, samples=4, batch_size=2,
        include_path=str(tmp_path / "tasks"), progress=seen,
    )  # fmt: skip
    assert result.n == 4
    assert seen.stages == [("lm_eval:texts", 16)]
    assert seen.steps == 16
    assert model.training
    assert capfd.readouterr().err == ""
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.random.get_rng_state(), states[2])


def test_a_vision_language_model_answers_texts(data: tuple[Path, Path], tmp_path: Path) -> None:
    model, processor = pico.llava(chat=False)
    task_file(tmp_path / "tasks", "texts", *data, doc_to_text="{{question}}", doc_to_choice="choices")
    found = suite("texts", model, processor, tmp_path / "tasks")
    assert found.n == 10
    assert found.value in [i / 10 for i in range(11)]


def test_a_group_has_its_members() -> None:
    found = {
        "results": {
            "group": {"alias": "group", "acc,none": 0.5, "acc_stderr,none": 0.1, "f1,strict": 0.25},
            "one": {"acc,none": 0.25, "acc_stderr,none": "N/A"},
            "two": {"acc,none": 0.75},
        },
        "group_subtasks": {"group": ["one", "two"]},
        "n-samples": {"one": {"effective": 4}, "two": {"effective": 6}},
    }
    result = result_of("group", found, {})
    assert (result.metric, result.value, result.stderr, result.n) == ("accuracy", 0.5, 0.1, 10)
    assert result.by_group == {"one": 0.25, "two": 0.75}
    assert {name: each.value for name, each in result.others.items()} == {"f1 (strict)": 0.25}
    del found["results"]["group"]
    assert result_of("group", found, {}).value == pytest.approx(0.5)
    with pytest.raises(CalibrationError, match="no number"):
        result_of("other", {"results": {}}, {})


def test_models_are_paired_over_the_questions(data: tuple[Path, Path], tmp_path: Path) -> None:
    """The differences are those of the questions, as lm-eval itself logs them."""
    task_file(tmp_path / "tasks", "texts", *data, doc_to_text="{{question}}", doc_to_choice="choices")
    models = [choices.llama(seed=1), choices.llama(seed=1)]
    with torch.no_grad():
        models[1].lm_head.weight.neg_()  # what was likely is not
    results = [suite("texts", model, choices.tokenizer(), tmp_path / "tasks") for model in models]
    samples = [one for result in results if (one := Samples.of(result)) is not None]
    found = paired(samples[:1], samples[1:])
    assert found is not None
    likely = [their_loglikelihoods("texts", model, tmp_path / "tasks", 0) for model in models]
    rows = choices.read(data[0])
    right = [[row["choices"][scores.index(max(scores))] == row["choices"][row["answer"]] for row, scores in
              zip(rows, of_model, strict=True)] for of_model in likely]  # fmt: skip
    gaps = [float(one) - float(two) for one, two in zip(*right, strict=True)]
    assert any(gaps)
    assert (found.n, found.better, found.worse) == (10, gaps.count(1.0), gaps.count(-1.0))
    assert found.stderr == pytest.approx(statistics.stdev(gaps) / 10**0.5)
    change = results[0].others["acc_norm"].value - results[1].others["acc_norm"].value
    assert found.others["acc_norm"].difference == pytest.approx(change)


def test_samples_of_groups_and_of_perplexities() -> None:
    def rows(metric: str, *values: Any) -> list[dict[str, Any]]:
        logs = [{"doc_id": number, "filter": "none", metric: value} for number, value in enumerate(values)]
        return logs[::-1]  # in any order

    found: dict[str, Any] = {
        "results": {"group": {"acc,none": 0.6}, "one": {"acc,none": 0.5}, "two": {"acc,none": 2 / 3}},
        "group_subtasks": {"group": ["one", "inner"], "inner": ["two"]},
        "n-samples": {"one": {"effective": 2}, "two": {"effective": 3}},
        "higher_is_better": {"one": {"acc": True}, "two": {"acc": True}},
        "samples": {"one": rows("acc", 1, 0), "two": rows("acc", True, False, 1.0)},
    }
    samples = Samples.of(result_of("group", found, {}))
    assert samples == Samples([1.0, 0.0, 1.0, 0.0, 1.0], [0, 1, 2, 3, 4], ["one", "one", "inner", "inner", "inner"])
    found["results"]["group"]["acc,none"] = (0.5 + 2 / 3) / 2  # a mean over the tasks is none over the samples
    assert Samples.of(result_of("group", found, {})) is None
    found["higher_is_better"]["two"]["acc"] = False
    assert result_of("group", found, {}).scores is None
    words = {
        "results": {"text": {"word_perplexity,none": math.exp(9 / 4)}},
        "n-samples": {"text": {"effective": 2}},
        "samples": {"text": rows("word_perplexity", (-3.0, 1), (-6.0, 3))},
    }
    assert Samples.of(result_of("text", words, {})) == Samples([3.0, 2.0], [0, 1], [], [1, 3])
    words["samples"] = {"text": rows("word_perplexity", (-3.0, 0), "nothing")}
    assert Samples.of(result_of("text", words, {})) is None


def test_refusals(data: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, words = choices.llama(), choices.tokenizer()
    folder = tmp_path / "tasks"
    task_file(folder, "texts", *data, doc_to_text="{{question}}", doc_to_choice="choices")
    task_file(folder, "gone", tmp_path / "gone.jsonl", data[1], doc_to_text="{{question}}", doc_to_choice="choices")
    task_file(
        folder, "hub", *data, doc_to_text="{{question}}", doc_to_choice="choices",
        dataset_path="somebody/questions", dataset_kwargs={},
    )  # fmt: skip
    for name in ("gone", "hub"):
        with pytest.raises(CalibrationError, match=f"the data of lm_eval:{name} can't be loaded"):
            suite(name, model, words, folder)
    with pytest.raises(InvalidOption, match="there is no such folder"):
        suite("texts", model, words, tmp_path / "nowhere")
    clip, processor = pico.clip()
    with pytest.raises(InvalidOption, match="needs a language model"):
        suite("texts", clip, processor, folder)
    import lm_eval.tasks

    known = lm_eval.tasks.TaskManager
    monkeypatch.setattr(  # the index of lm-eval's 14,000 own tasks takes seconds to read
        lm_eval.tasks, "TaskManager", lambda include_path, include_defaults: known(None, include_path, False)
    )
    from ecoflap.evaluation import lm_eval as ours

    ours._task_manager.cache_clear()
    with pytest.raises(UnknownName, match="did you mean 'texts'"):
        suite("text", model, words, folder)
    ours._task_manager.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "lm_eval.models.huggingface", None)
    with pytest.raises(MissingDependency, match=r"pip install 'ecoflap\[lm-eval\]'"):
        suite("texts", model, words, folder)
