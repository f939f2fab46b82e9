"""A random checkpoint pruned from the disk under a memory limit of a part of its size, by the command line.

    python benchmarks/larger_than_memory.py [--shape llama-7b] [--fraction 0.25] [--folder DIR] [--output FILE]

The checkpoint is written shard by shard. ``ecoflap prune --device-map disk`` runs in a process of its own; its resident
memory (mapped pages of files included, which the system could take back) is looked at all the time, and a process that
exceeds the limit is killed. The kernel's own high-water mark is what is printed. First a small twin of the same shape
is pruned both ways, from the disk and in memory: the two saved models must be the same files. All files are removed at
the end; at its peak the work needs three times the checkpoint's size on the disk.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

GB = 10**9
LOOK = 0.01  # seconds between two looks at the child's memory
# Published sizes; the twin has the same shape with these put in their place.
SHAPES: dict[str, dict[str, int]] = {
    "llama-7b": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "vocab_size": 32000},
    "llama-3-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256},
    "llama-1b": {
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
        "num_key_value_heads": 4, "vocab_size": 32000},
}  # fmt: skip
TWIN = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 128}  # fmt: skip
WORDS = [f"w{number}" for number in range(100)]


def write_checkpoint(folder: Path, sizes: dict[str, int], shard_bytes: int) -> int:
    """A checkpoint of bf16 noise with its tokenizer, never more of it in memory than one shard; its bytes."""
    config = LlamaConfig(**sizes, max_position_embeddings=2048, tie_word_embeddings=False, dtype="bfloat16",
                          bos_token_id=0, eos_token_id=1, pad_token_id=1)  # fmt: skip
    config.architectures = [LlamaForCausalLM.__name__]
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<s>", "</s>", *WORDS])}, "w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(folder)
    groups = list(_shards(shapes, shard_bytes))
    torch.manual_seed(0)
    index: dict[str, str] = {}
    for number, names in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        save_file({name: _drawn(name, shapes[name]) for name in names}, folder / file, {"format": "pt"})
        index |= dict.fromkeys(names, file)
    total = sum(2 * torch.Size(size).numel() for size in shapes.values())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index}), "utf-8"
    )
    return total


def _shards(shapes: dict[str, tuple[int, ...]], limit: int) -> Iterator[list[str]]:
    group: list[str] = []
    filled = 0
    for name, size in shapes.items():
        weight = 2 * torch.Size(size).numel()
        if group and filled + weight > limit:
            yield group
            group, filled = [], 0
        group.append(name)
        filled += weight
    yield group


def _drawn(name: str, size: tuple[int, ...]) -> Tensor:
    if "norm" in name:
        return torch.ones(size, dtype=torch.bfloat16)
    return torch.empty(size, dtype=torch.bfloat16).normal_(std=0.02)


def prune(model: Path, text: Path, run: Path, options: argparse.Namespace, *more: str) -> list[str]:
    """The command line of one run."""
    return [
        sys.executable, "-m", "ecoflap", "prune", str(model), "--calibration", str(text), "--samples",
        str(options.samples), "--importance-samples", str(options.samples), "--batch-size", str(options.samples),
        "--sequence-length", str(options.length), "--importance", options.importance, "--criterion", options.criterion,
        "--sparsity", "0.5", "--device", "cpu", "--output", str(run), "--quiet", *more,
    ]  # fmt: skip


def watched(command: list[str], limit: float) -> dict[str, float]:
    """Run it; seconds and peak bytes. Raises SystemExit where it fails, or exceeds the limit and is killed."""
    begin = time.perf_counter()
    peak = anonymous = 0
    with subprocess.Popen(command) as child:
        while child.poll() is None:
            found = _memory(child.pid)
            peak, anonymous = max(peak, found.get("VmHWM", 0)), max(anonymous, found.get("RssAnon", 0))
            if peak > limit:
                child.kill()
                raise SystemExit(f"killed: {peak / GB:.2f} GB are more than the limit of {limit / GB:.2f} GB")
            time.sleep(LOOK)
    if child.returncode:
        raise SystemExit(f"failed with exit code {child.returncode}: {' '.join(command)}")
    return {"seconds": time.perf_counter() - begin, "peak_bytes": peak, "peak_anonymous_bytes": anonymous}


def _memory(process: int) -> dict[str, int]:
    """Bytes by the kernel's names; empty when the process has just ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text("ascii").splitlines()
    except OSError:
        return {}
    rows = (line.split() for line in lines if line.startswith(("VmHWM", "RssAnon")))
    return {row[0].rstrip(":"): 1024 * int(row[1]) for row in rows}


def same_files(a: Path, b: Path) -> bool:
    """Whether two saved models have the same files with the same bytes; the cards tell of their runs."""
    names = sorted(path.name for path in a.iterdir())
    return names == sorted(path.name for path in b.iterdir()) and all(
        (a / name).read_bytes() == (b / name).read_bytes() for name in names if name != "README.md"
    )


def twin(folder: Path, text: Path, options: argparse.Namespace) -> bool:
    """Prune a small model of the same kind both ways; whether the saved models are the same."""
    write_checkpoint(folder / "twin", {**SHAPES[options.shape], **TWIN}, 100_000)
    for name, more in (("memory", ()), ("disk", ("--device-map", "disk"))):
        subprocess.run(prune(folder / "twin", text, folder / name, options, *more), check=True)
    return same_files(folder / "memory" / "model", folder / "disk" / "model")


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Twin first, then the large one; what is printed."""
    text = folder / "text.txt"
    choose = random.Random(0)
    text.write_text(" ".join(choose.choice(WORDS) for _ in range(20 * options.samples * options.length)), "utf-8")
    same = twin(folder, text, options)
    sizes = {**SHAPES[options.shape], **({"num_hidden_layers": options.layers} if options.layers else {})}
    total = write_checkpoint(folder / "large", sizes, round(options.shard * GB))
    limit = options.fraction * total + options.allowance * GB
    found = watched(prune(folder / "large", text, folder / "run", options, "--device-map", "disk"), limit)
    metrics = json.loads((folder / "run" / "metrics.json").read_text("utf-8"))
    return {
        "shape": options.shape,
        "parameters": total // 2,
        "bytes": total,
        "limit_bytes": limit,
        **found,
        "sparsity": metrics["sparsity"]["prunable"],
        "stages": metrics["stages"],
        "twin_same": same,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-7b")
    parser.add_argument("--layers", type=int, help="blocks, where not all of the shape's")
    parser.add_argument("--fraction", type=float, default=0.25, help="of the checkpoint's bytes: the limit")
    parser.add_argument("--allowance", type=float, default=0.0, help="GB beside it, for Python and torch themselves")
    parser.add_argument("--shard", type=float, default=1.0, help="GB of a weight file")
    parser.add_argument("--criterion", default="wanda")
    parser.add_argument("--importance", default="uniform")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--length", type=int, default=16, help="tokens per sample")
    parser.add_argument("--folder", type=Path, help="where the files go; by default where temporary files do")
    parser.add_argument("--output", type=Path, help="write the numbers as JSON, too")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="larger-than-memory-", dir=options.folder))
    try:
        found = measure(folder, options)
    finally:
        shutil.rmtree(folder)
    print(f"{found['shape']}: {found['parameters']:,} parameters, {found['bytes'] / GB:.2f} GB in bf16")
    print(f"limit   {found['limit_bytes'] / GB:8.2f} GB")
    share = found["peak_bytes"] / found["bytes"]
    print(f"peak    {found['peak_bytes'] / GB:8.2f} GB resident, {share:.3f} of the checkpoint")
    print(f"        {found['peak_anonymous_bytes'] / GB:8.2f} GB at most that are not pages of files")
    print(f"time    {found['seconds']:8.1f} s, sparsity {found['sparsity']:.4f}")
    for stage in found["stages"]:
        print(f"        {stage['seconds']:8.1f} s   {stage['peak_memory_bytes'] / GB:.2f} GB   {stage['name']}")
    print(f"twin pruned from the disk and in memory, the same files to the bit: {found['twin_same']}")
    if options.output:
        options.output.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    if not found["twin_same"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
