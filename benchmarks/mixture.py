"""A small mixture of experts, trained on prose letter by letter, and what pruning does to it.

    python benchmarks/mixture.py train FOLDER                            # a quarter of an hour on one core
    python benchmarks/mixture.py measure FOLDER --output results.json

Measured are bits per letter of held-out prose: over the least number of tokens that an expert has statistics of
(``--expert-tokens``), with few and with many calibration windows; and with one sparsity per block or per expert
(``--granularity``). Training goes on where it was broken off; finished cells are kept and not done again.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from assets import fetch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

import ecoflap
from ecoflap.model.anatomy import discover
from ecoflap.statistics.choice import TokenChoice
from ecoflap.statistics.routing import routing
from ecoflap.support.files import write_json

LENGTH, EXPERTS = 128, 16
SEEDS, SAMPLES, LEAST = (0, 1, 2), (2, 8, 32), (0, 32, 128, 512, 2048)
CRITERIA = ("wanda", "sparsegpt", "admm")
SPARSITIES, GRANULARITIES = (0.5, 0.6, 0.7), ("block", "expert")
CONFIG: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 4, "head_dim": 32, "num_local_experts": EXPERTS, "num_experts_per_tok": 2,
    "max_position_embeddings": LENGTH, "tie_word_embeddings": False, "router_aux_loss_coef": 0.0003,
    "output_router_logits": True,
}  # fmt: skip


def letters() -> tuple[Tensor, Tensor, int]:
    """Numbers of the letters to train on, and of those to test on, and how many different ones there are."""
    folder = fetch("prose")
    texts = [(folder / f"prose-{part}.txt").read_text("utf-8") for part in ("train", "test")]
    known = {letter: number for number, letter in enumerate(sorted(set(texts[0])))}
    train, test = (torch.tensor([known[letter] for letter in text if letter in known]) for text in texts)
    return train, test, len(known)


def windows(text: Tensor, count: int, seed: int) -> Tensor:
    """(count, LENGTH) windows that begin anywhere."""
    starts = torch.randint(len(text) - LENGTH, (count,), generator=torch.Generator().manual_seed(seed))
    return torch.stack([text[start : start + LENGTH] for start in starts])


def train(folder: Path, steps: int, seconds: float) -> None:
    """Goes on where the last call stopped, for at most ``seconds``; the learning rate falls to zero at ``steps``."""
    text, _, kinds = letters()
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(vocab_size=kinds, **CONFIG))
    parameters = dict(model.named_parameters())
    optimiser = torch.optim.AdamW(parameters.values(), weight_decay=0.05)
    state, begin = folder / "training.safetensors", 0
    if state.exists():
        stored = load_file(state)
        begin = int(stored["step"])
        for name, parameter in parameters.items():
            parameter.data.copy_(stored[name])
            optimiser.state[parameter] = {
                "step": torch.tensor(float(begin)),
                **{part: stored[f"{part}.{name}"] for part in ("exp_avg", "exp_avg_sq")},
            }
    end = time.monotonic() + seconds
    for step in range(begin, steps):
        if time.monotonic() > end:
            steps = step
            break
        for group in optimiser.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 100) * (1 + math.cos(math.pi * step / steps)) / 2
        ids = windows(text, 16, seed=step)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        if step % 100 == 0:
            print(step, f"{loss.item() / math.log(2):.3f} bits", flush=True)
    print(steps, "steps", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: parameter.data for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        for part in ("exp_avg", "exp_avg_sq"):
            tensors[f"{part}.{name}"] = optimiser.state[parameter][part]
    save_file({**tensors, "step": torch.tensor(steps)}, state)
    model.config.output_router_logits = False
    model.save_pretrained(folder)


@torch.no_grad()
def bits(model: MixtralForCausalLM, test: Tensor) -> float:
    """Mean bits per letter over 256 windows."""
    losses = [model(input_ids=ids, labels=ids).loss.item() for ids in windows(test, 256, seed=1).split(32)]
    return statistics.fmean(losses) / math.log(2)


def measure(folder: Path, output: Path, seconds: float) -> None:
    """Fill in the cells that are missing, for at most ``seconds``, and print what is there."""
    text, test, _ = letters()
    dense = MixtralForCausalLM.from_pretrained(folder).eval()
    done: dict[str, Any] = json.loads(output.read_text()) if output.exists() else {}
    end = time.monotonic() + seconds

    def calibration(samples: int, seed: int) -> list[dict[str, Tensor]]:
        return [{"input_ids": part, "labels": part} for part in windows(text, samples, seed=1000 + seed).split(16)]

    def cell(name: str, sparsity: float, samples: int, least: int, seed: int, **options: Any) -> None:
        if name in done or time.monotonic() > end:
            return
        model = copy.deepcopy(dense)
        tokens = TokenChoice(experts=least)
        result = ecoflap.prune(model, calibration(samples, seed), sparsity, tokens=tokens, **options)
        assert abs(result.sparsity - sparsity) < 1e-3
        done[name] = bits(model, test)
        print(name, f"{done[name]:.4f}", flush=True)
        write_json(output, done)

    if "dense" not in done:
        done["dense"] = bits(dense, test)
        anatomy = discover(dense, calibration(1, 0)[0])
        for samples in SAMPLES:
            found = routing(dense, anatomy, calibration(samples, 0), lambda model, batch: model(**batch))
            done[f"tokens of {samples}"] = [sorted(tokens.values()) for tokens in found.values()]
    for seed in SEEDS:
        for criterion in CRITERIA:
            for samples in SAMPLES:
                for least in LEAST:
                    cell(
                        f"{criterion} {samples} windows, least {least}, seed {seed}", 0.5, samples, least, seed,
                        importance="uniform", criterion=criterion,
                    )  # fmt: skip
        for sparsity in SPARSITIES:
            for granularity in GRANULARITIES:
                cell(
                    f"{granularity} at {sparsity}, seed {seed}", sparsity, 32, 128, seed,
                    importance="gradient-norm", granularity=granularity, criterion="admm",
                )  # fmt: skip
    show(done)


def show(done: dict[str, Any]) -> None:
    """Tables of means over the seeds that are there; in brackets the difference from the first column and its error."""
    print("dense", f"{done['dense']:.4f}", {key: found for key, found in done.items() if key.startswith("tokens")})
    print("| |", " | ".join(map(str, LEAST)), "|")
    for criterion in CRITERIA:
        for samples in SAMPLES:
            names = [f"{criterion} {samples} windows, least {least}" for least in LEAST]
            print(f"| {criterion}, {samples} windows |", _row(done, names))
    print("| |", " | ".join(GRANULARITIES), "|")
    for sparsity in SPARSITIES:
        print(f"| {sparsity} |", _row(done, [f"{granularity} at {sparsity}" for granularity in GRANULARITIES]))


def _row(done: dict[str, Any], names: list[str]) -> str:
    seeds = [seed for seed in SEEDS if all(f"{name}, seed {seed}" in done for name in names)]
    if not seeds:
        return ""
    first = [done[f"{names[0]}, seed {seed}"] for seed in seeds]
    cells = [f"{statistics.fmean(first):.4f}"]
    for name in names[1:]:
        values = [done[f"{name}, seed {seed}"] for seed in seeds]
        differences = [value - start for value, start in zip(values, first, strict=True)]
        error = statistics.stdev(differences) / math.sqrt(len(seeds)) if len(seeds) > 1 else math.nan
        cells.append(f"{statistics.fmean(values):.4f} ({statistics.fmean(differences):+.4f} ± {error:.4f})")
    return " | ".join(cells) + f" | ({len(seeds)} seeds)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("train", "measure"):
        command = commands.add_parser(name)
        command.add_argument("folder", type=Path)
    commands.choices["train"].add_argument("--steps", type=int, default=6500)
    for command in commands.choices.values():
        command.add_argument(
            "--seconds", type=float, default=math.inf, help="then it ends, and goes on when called again"
        )
    commands.choices["measure"].add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    if options.command == "train":
        train(options.folder, options.steps, options.seconds)
    else:
        measure(options.folder, options.output, options.seconds)


if __name__ == "__main__":
    main()
