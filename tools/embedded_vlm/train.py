"""Trains the embedded VLM from a seed.

PYTHONPATH=tools python -m embedded_vlm.train --output DIR [--easy-vqa DIR]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from embedded_vlm import easy_vqa
from embedded_vlm.bridge import train_bridge
from embedded_vlm.bundle import calibration_rows, test_rows, write_parquet
from embedded_vlm.data import draw, read_pictures
from embedded_vlm.model import IMAGE_SIZE, NUM_QUERIES, build_model
from embedded_vlm.questions import vocabulary_samples
from embedded_vlm.scenes import sample_scenes
from embedded_vlm.text import train_text
from embedded_vlm.tokenizer import build_processor, build_tokenizer
from embedded_vlm.vision import train_vision

STAGES = ("vision", "text", "bridge", "bundle")
SCENES_DRAWN = 16000


def save_part(module: Any, path: Path) -> None:
    """Write a module's weights; the file appears whole or not at all."""
    partial = path.with_suffix(".partial")
    save_file({name: value.detach().clone().contiguous() for name, value in module.state_dict().items()}, partial)
    partial.replace(path)


def save_model(model: Any, processor: Any, folder: Path) -> None:
    """Write the folder that ``from_pretrained`` reads."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the stages asked for; each leaves a file in the output folder that the next one reads."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder for the stages' weights and the model")
    parser.add_argument("--easy-vqa", type=Path, help="unpacked easy-vqa package (default: the installed one)")
    parser.add_argument("--stage", choices=("all", *STAGES), default="all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--vision-steps", type=int, default=1500)
    parser.add_argument("--text-steps", type=int, default=2500)
    parser.add_argument("--alignment-steps", type=int, default=600)
    parser.add_argument("--bridge-steps", type=int, default=600)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    options.output.mkdir(parents=True, exist_ok=True)
    stages = STAGES if options.stage == "all" else (options.stage,)

    pictures = easy_vqa.read(easy_vqa.find(options.easy_vqa), "train")
    texts = [q.question for picture in pictures for q in picture.questions]
    tokenizer = build_tokenizer([*vocabulary_samples(), *texts])
    processor = build_processor(tokenizer, NUM_QUERIES, IMAGE_SIZE)
    model = build_model(tokenizer, options.seed)
    model.eval()
    vision_file, text_file = options.output / "vision.safetensors", options.output / "text.safetensors"

    look = {"mean": processor.image_processor.image_mean, "std": processor.image_processor.image_std}

    if {"vision", "bridge"} & set(stages):
        scenes = draw(sample_scenes(options.seed, "train", SCENES_DRAWN), options.seed)
        easy = read_pictures(pictures)
    if "vision" in stages:
        train_vision(
            model.vision_model,
            scenes,
            easy,
            **look,
            steps=options.vision_steps,
            batch_size=64,
            learning_rate=1e-3,
            seed=options.seed,
            checkpoint=lambda: save_part(model.vision_model, vision_file),
        )
    if "text" in stages:
        train_text(
            model.language_model,
            tokenizer,
            pictures,
            steps=options.text_steps,
            batch_size=96,
            learning_rate=1e-3,
            seed=options.seed,
            checkpoint=lambda: save_part(model.language_model, text_file),
        )
    if "bridge" in stages:
        model.vision_model.load_state_dict(load_file(vision_file))
        model.language_model.load_state_dict(load_file(text_file))
        folder = options.output / "model"
        train_bridge(
            model,
            tokenizer,
            scenes,
            easy,
            pictures,
            **look,
            alignment_steps=options.alignment_steps,
            steps=options.bridge_steps,
            batch_size=96,
            learning_rate=1e-3,
            seed=options.seed,
            checkpoint=lambda: save_model(model, processor, folder),
        )
    if "bundle" in stages:
        test = easy_vqa.read(easy_vqa.find(options.easy_vqa), "test")
        write_parquet(calibration_rows(pictures, options.seed), options.output / "calibration.parquet")
        write_parquet(test_rows(test, options.seed + 1), options.output / "test.parquet")


if __name__ == "__main__":
    main()
