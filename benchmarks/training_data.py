"""Writes training questions for the embedded VLM: easy-VQA's train split and generated scenes, as its calibration has.

    PYTHONPATH=tools python benchmarks/training_data.py 4000 train.parquet

Three eighths are questions of easy-VQA's train split (the package ``easy-vqa``), the rest questions of all kinds on
scenes of the train split; one in ten of these is a caption. No scene of it is among the bundled test questions, whose
splits are disjoint.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from embedded_vlm import easy_vqa
from embedded_vlm.bundle import easy_rows, scene_rows, write_parquet
from embedded_vlm.questions import KINDS


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("samples", type=int)
    parser.add_argument("output", type=Path)
    parser.add_argument("--easy-vqa", type=Path, help="Folder of the unpacked package; default: where it is installed.")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    pictures = easy_vqa.read(easy_vqa.find(options.easy_vqa), "train")
    easy = easy_rows(pictures, options.samples * 3 // 8, options.seed)
    scenes = options.samples - len(easy)
    per_kind = scenes * 9 // 10 // len(KINDS)
    rows = easy + scene_rows("train", per_kind, scenes - per_kind * len(KINDS), options.seed)
    random.Random(f"training/{options.seed}").shuffle(rows)
    write_parquet(rows, options.output)
    print(f"{len(rows)} samples in {options.output}")


if __name__ == "__main__":
    main()
