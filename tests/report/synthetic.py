"""A run directory as a finished run leaves it, made up: a ViT, a T5 encoder and a T5 decoder, 36 + 4 + 4 blocks."""

import json
import random
from pathlib import Path

import yaml

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
