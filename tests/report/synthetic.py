"""A run directory as a finished run leaves it, made up: a ViT, a T5 encoder and a T5 decoder, 36 + 4 + 4 blocks."""

import io
import json
import random
from math import cos, exp
from pathlib import Path

import yaml
from PIL import Image

TOWERS = {
    "vision_model.encoder.layers": ("vision", 36, {"self_attn.qkv": (192, 64), "mlp.fc1": (256, 64)}),
    "language_model.encoder.block": ("language", 4, {"layer.0.SelfAttention.q": (96, 96), "layer.1.wo": (96, 384)}),
    "language_model.decoder.block": ("language", 4, {"layer.0.SelfAttention.q": (96, 96), "layer.2.wo": (96, 384)}),
}
RECIPE = {
    "model": None,
    "sparsity": 0.5,
    "max_sparsity": 0.6,
    "importance": "zeroth-order",
    "granularity": "block",
    "aggregate": "sum",
    "criterion": "wanda",
    "pattern": "unstructured",
    "calibration": None,
    "samples": 128,
    "importance_samples": 32,
    "batch_size": 8,
    "seed": 0,
    "device": "cpu",
    "dtype": "auto",
    "versions": {"ecoflap": "0.1.0", "torch": "2.13.0"},
    "fingerprint": "sha256:" + "ab" * 32,
}


def importance(seed: int = 0) -> dict:
    rng = random.Random(seed)
    layers = []
    for tower, (modality, count, kinds) in TOWERS.items():
        for index in range(count):
            for kind, shape in kinds.items():
                score = (2e-4 if modality == "vision" else 3e-2) * rng.lognormvariate(0, 0.7)
                layers.append(
                    {
                        "name": f"{tower}.{index}.{kind}.weight",
                        "tower": tower,
                        "modality": modality,
                        "block": f"{tower}.{index}",
                        "shape": list(shape),
                        "score": score,
                        "stderr": 0.3 * score,
                        "n": 32,
                    }
                )
    return {"format": 1, "method": "zeroth-order", "settings": {"epsilon": 1e-3}, "layers": layers}


def allocation(seed: int = 1) -> dict:
    rng = random.Random(seed)
    layers = []
    for layer in importance()["layers"]:
        weights = layer["shape"][0] * layer["shape"][1]
        zeros = round(weights * min(rng.uniform(0.35, 0.68), 0.6))
        kept = {key: layer[key] for key in ("name", "tower", "modality", "block", "shape")}
        layers.append(kept | {"weights": weights, "zeros": zeros, "sparsity": zeros / weights})
        layers[-1]["achieved"] = zeros / weights
    return {
        "format": 1,
        "sparsity": 0.5,
        "max_sparsity": 0.6,
        "granularity": "block",
        "aggregate": "sum",
        "pattern": "unstructured",
        "total_weights": sum(layer["weights"] for layer in layers),
        "zeros": sum(layer["zeros"] for layer in layers),
        "layers": layers,
    }


def searched(steps: int = 5) -> dict:
    """An allocation that a search has come to."""
    rng, found = random.Random(2), allocation()
    given = {layer["name"]: round(layer["weights"] * rng.uniform(0.4, 0.6)) for layer in found["layers"]}
    blocks = dict.fromkeys(layer["block"] for layer in found["layers"])
    search = {
        "metric": "kl",
        "losses": [0.8 * exp(-0.3 * step) for step in range(steps)],
        "rounds": ["start", *(f"block {step}" for step in range(1, steps))],
        "given": given,
        "costs": {block: rng.uniform(-0.002, 0.02) for block in blocks},
    }
    return found | {"search": search}


def metrics() -> dict:
    def vqa(shift: float) -> dict:
        groups = {"easy-vqa/color": 0.991, "easy-vqa/shape": 0.984, "scenes/count": 0.712, "scenes/relation": 0.655}
        return {
            "metric": "accuracy",
            "value": 0.871 - shift,
            "stderr": 0.0094,
            "n": 1280,
            "by_group": {name: value - shift for name, value in groups.items()},
        }

    towers = {}
    for layer in allocation()["layers"]:
        tower = towers.setdefault(layer["tower"], {"modality": layer["modality"], "weights": 0, "zeros": 0})
        tower["weights"] += layer["weights"]
        tower["zeros"] += layer["zeros"]
    for tower in towers.values():
        tower["sparsity"] = tower["zeros"] / tower["weights"]
    stages = [("load", 1.4), ("importance", 93.2), ("pruning", 21.7), ("evaluation", 48.0), ("saving", 0.31)]
    return {
        "format": 1,
        "dense": {"vqa": vqa(0.0), "perplexity": {"metric": "perplexity", "value": 26.74, "stderr": 0.41, "n": 64}},
        "pruned": {"vqa": vqa(0.043), "perplexity": {"metric": "perplexity", "value": 49.2, "stderr": 0.8, "n": 64}},
        "sparsity": {"prunable": 0.5, "model": 0.4137, "towers": towers},
        "stages": [
            {"name": name, "seconds": seconds, "peak_memory_bytes": int(7e8 + 4e6 * seconds), "peak_cuda_bytes": None}
            for name, seconds in stages
        ],
        "environment": {"python": "3.11.7", "platform": "Linux x86_64", "threads": 2},
    }


def write_run(folder: Path, **replace: object) -> Path:
    """Write the four files; ``replace`` gives another content for one of them, None leaves it out."""
    files = {"recipe": RECIPE, "importance": importance(), "allocation": allocation(), "metrics": metrics()} | replace
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        if content is None:
            continue
        if name == "recipe":
            (folder / "recipe.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
        else:
            (folder / f"{name}.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    return folder


def png(width: int = 8, height: int = 6, colour: tuple[int, int, int] = (40, 110, 180)) -> bytes:
    """A small picture of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(buffer, "PNG")
    return buffer.getvalue()


def predictions(task: str = "vqa", pictured: int = 3) -> dict:
    """40 samples of one task: 25 both right, 8 and 3 right for one alone, 4 both wrong; a few have pictures."""
    kinds = ["both_right"] * 25 + ["only_dense"] * 8 + ["only_pruned"] * 3 + ["both_wrong"] * 4
    rows = []
    for index, kind in enumerate(kinds):
        dense, pruned = kind in ("both_right", "only_dense"), kind in ("both_right", "only_pruned")
        rows.append(
            {
                "index": index,
                "question": f"what colour is shape {index}?",
                "truth": "blue",
                "dense": "blue" if dense else "red",
                "pruned": "blue" if pruned else "a green one",
                "dense_score": float(dense),
                "pruned_score": float(pruned),
                "kind": "color",
                "picture": f"pictures/{task}-{index:06d}.png"
                if sum(k == kind for k in kinds[:index]) < pictured
                else None,
            }
        )
    counts = {kind: kinds.count(kind) for kind in ("both_right", "only_dense", "only_pruned", "both_wrong")}
    return {"format": 1, "tasks": {task: {"rows": rows, "counts": counts}}}


def distributions() -> dict:
    def histogram(middle: float) -> dict:
        edges = [middle - 3 + 0.25 * i for i in range(25)]
        heights = [exp(-((edge + 0.125 - middle) ** 2)) for edge in edges[:-1]]
        share = [height / sum(heights) for height in heights]
        return {"log10_edges": edges, "share": share, "median": 10**middle, "zeros": 0.02}

    towers = {}
    for place, (tower, (modality, _, _)) in enumerate(TOWERS.items()):
        middles = {"weight": -1.8 + 0.2 * place, "gradient": -5 + place, "local": -1 + 0.7 * place}
        towers[tower] = {"modality": modality} | {name: histogram(middle) for name, middle in middles.items()}
    return {"format": 1, "towers": towers}


def agreement() -> dict:
    names = ["zeroth-order", "first-order", "gradient-norm", "owl", "alphapruning", "dlp"]
    matrix = [[1.0 if i == j else round(cos(0.6 * abs(i - j)), 3) for j in range(6)] for i in range(6)]
    matrix[0][5] = matrix[5][0] = None
    return {"format": 1, "granularity": "block", "measures": names, "spearman": matrix, "n": 44}


def effects() -> dict:
    def line(values: list) -> list:
        return [{"value": value, "spearman": 0.9 - 0.1 / (i + 1), "stderr": 0.02} for i, value in enumerate(values)]

    towers = list(TOWERS)
    return {
        "format": 1,
        "effects": {"epsilon": line([1e-4, 1e-3, 1e-2]), "draws": line([1, 2, 4, 8]), "samples": line([8, 16, 32])},
        "allocations": {
            "granularity": {name: dict.fromkeys(towers, 0.4 + 0.1 * i) for i, name in enumerate(("layer", "block"))},
            "cap": {f"{cap}": {tower: cap - 0.02 * i for i, tower in enumerate(towers)} for cap in (0.5, 0.6)},
        },
    }


def landscape() -> dict:
    steps = [-1 + 0.25 * i for i in range(9)]

    def loss(a: float, b: float, floor: float) -> float:
        return floor + 30 * (a * a + b * b)

    line = {"alpha": steps, "dense": [loss(a, 0, 0.5) for a in steps], "pruned": [loss(a, 0, 0.9) for a in steps]}
    plane = {"alpha": steps, "beta": steps}
    for name, floor in (("dense", 0.5), ("pruned", 0.9)):
        plane[name] = [[loss(a, b, floor) for b in steps] for a in steps]
    plane["pruned"][0][0] = None
    return {"format": 1, "line": line, "plane": plane}


def write_analyses(folder: Path, **replace: object) -> Path:
    """Predictions with pictures and the four analyses, into a run directory; as :func:`write_run`."""
    files = {
        "predictions": predictions(),
        "analysis/distributions": distributions(),
        "analysis/agreement": agreement(),
        "analysis/effects": effects(),
        "analysis/landscape": landscape(),
    } | replace
    (folder / "analysis").mkdir(parents=True, exist_ok=True)
    (folder / "pictures").mkdir(exist_ok=True)
    for name, content in files.items():
        if content is not None:
            (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    for task in (files["predictions"] or {"tasks": {}})["tasks"].values():
        for row in task["rows"]:
            if row["picture"]:
                (folder / row["picture"]).write_bytes(png())
    return folder


METHODS = {
    "zeroth-order+wanda": ("zeroth order, Wanda", ["ecoflap", "wanda"], 0.02),
    "uniform+wanda": ("uniform, Wanda", ["wanda"], 0.0),
    "owl+sparsegpt": ("OWL, SparseGPT", ["owl", "sparsegpt"], 0.03),
    "global-magnitude": ("global magnitude", ["global-magnitude"], -0.1),
}


def comparison(seeds: int = 3, sparsities: tuple = (0.3, 0.4, 0.5, 0.6, 0.7)) -> dict:
    """``compare.json`` of four methods; one cell has failed."""
    rng = random.Random(5)
    cells = []
    for name, (_, _, lift) in METHODS.items():
        for sparsity in sparsities:
            for seed in range(seeds):
                value = 0.9 - 1.6 * max(sparsity - 0.35, 0) ** 1.5 + lift * sparsity + rng.gauss(0, 0.008)
                cells.append(
                    {
                        "method": name,
                        "sparsity": sparsity,
                        "seed": seed,
                        "value": value,
                        "stderr": 0.01,
                        "n": 1280,
                        "others": {},
                        "achieved": sparsity,
                        "towers": {tower: sparsity + lift * (1 - i) for i, tower in enumerate(TOWERS)},
                        "seconds": {"importance": 40.0, "allocation": 0.1, "pruning": 9.0 + lift, "evaluation": 12.0},
                        "peak_memory_bytes": 700_000_000,
                        "peak_cuda_bytes": None,
                        "error": None,
                    }
                )
    cells[-1] |= {"value": None, "stderr": None, "achieved": None, "towers": {}, "error": "out of memory <at> block 3"}
    return {
        "format": 1,
        "model": "embedded VLM",
        "task": "vqa",
        "metric": "accuracy",
        "higher_is_better": True,
        "dense": {"value": 0.931, "stderr": 0.006, "n": 1280},
        "methods": [
            {
                "name": name,
                "title": title,
                "importance": name.partition("+")[0],
                "criterion": name.partition("+")[2],
                "options": {"granularity": "block"} if "wanda" in name else {},
                "citations": keys,
            }
            for name, (title, keys, _) in METHODS.items()
        ],
        "sparsities": list(sparsities),
        "seeds": list(range(seeds)),
        "cells": cells,
        "recipe": {"model": None, "samples": 128},
        "environment": {"python": "3.11.7", "versions": {"torch": "2.13.0"}},
        "command": "ecoflap compare --sparsities 0.3:0.7:0.1",
    }


def write_comparison(folder: Path, content: dict | None = None) -> Path:
    """A folder with a ``compare.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "compare.json").write_text(json.dumps(content or comparison()), encoding="utf-8")
    return folder
