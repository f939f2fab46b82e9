"""Folders of images: captions beside them, one folder a class, ImageNet's lists, images alone."""

import os
from pathlib import Path

import made
import pico
import pytest

from ecoflap.data import load_samples, make_batches
from ecoflap.errors import CalibrationError


def test_captions_beside(tmp_path: Path) -> None:
    made.pictures(tmp_path, ["b.jpg", "a.png", "sub/c.webp"])
    for name, caption in (("a.txt", " a cat \n"), ("b.txt", "a dog"), ("sub/c.txt", "two\nlines")):
        (tmp_path / name).write_text(caption)
    drawn = load_samples(tmp_path, samples=None, seed=0).samples
    assert [sample.text for sample in drawn] == ["a cat", "a dog", "two\nlines"]
    assert [made.shows(sample, number) for sample, number in zip(drawn, (1, 0, 2), strict=True)] == [True] * 3


def test_captions_beside_in_sub_folders_alone(tmp_path: Path) -> None:
    made.pictures(tmp_path, ["0000/a.jpg", "0001/b.jpg"])
    for name in ("0000/a", "0001/b"):
        (tmp_path / f"{name}.txt").write_text(name)
    assert [sample.text for sample in load_samples(tmp_path, samples=None, seed=0).samples] == ["0000/a", "0001/b"]


def test_a_missing_caption_is_a_broken_sample(tmp_path: Path) -> None:
    made.pictures(tmp_path, [f"{number:02d}.png" for number in range(40)])
    for number in range(39):
        (tmp_path / f"{number:02d}.txt").write_text("x")
    drawn = load_samples(tmp_path, samples=None, seed=0)
    assert (len(drawn.samples), drawn.skipped) == (39, 1)
    os.mkfifo(tmp_path / "39.txt")  # nor is a pipe waited for, which is read as empty
    assert len(load_samples(tmp_path, samples=None, seed=0).samples) >= 39
    (tmp_path / "39.txt").unlink()
    (tmp_path / "39.txt").mkdir()
    assert load_samples(tmp_path, samples=None, seed=0).skipped == 1
    for number in range(3):
        (tmp_path / f"{number:02d}.txt").unlink()
    with pytest.raises(CalibrationError, match=r"'\d\d.png' has no .txt with its caption beside it"):
        load_samples(tmp_path, samples=None, seed=0)


@pytest.mark.parametrize("around", ["", "101_ObjectCategories/", "a/b/"])
def test_class_folders(around: str, tmp_path: Path) -> None:
    made.pictures(tmp_path, [f"{around}dollar_bill/1.jpg", f"{around}ant/2.jpg", f"{around}ant/deep/3.jpg"])
    (tmp_path / "empty").mkdir()
    drawn = load_samples(tmp_path, samples=None, seed=0)
    assert drawn.classes == ("ant", "dollar_bill")
    assert [(sample.label, sample.text) for sample in drawn.samples] == [(x, x) for x in ("ant", "ant", "dollar_bill")]
    assert made.shows(drawn.samples[1], 2)
    assert drawn.columns == {"image": "image", "label": "label"}


def test_splits_of_class_folders(tmp_path: Path) -> None:
    made.pictures(tmp_path, ["train/ant/1.jpg", "train/bee/2.jpg", "val/ant/3.jpg", "val/bee/4.jpg"])
    assert made.shows(load_samples(tmp_path, samples=None, seed=0).samples[0], 0)
    for split in ("val", "validation"):
        if split == "validation":
            (tmp_path / "val").rename(tmp_path / "validation")
        drawn = load_samples(f"{tmp_path}:{split[:3]}", samples=None, seed=0)
        assert made.shows(drawn.samples[0], 2)
        assert drawn.classes == ("ant", "bee")
    with pytest.raises(CalibrationError, match=r"no folder 'test': give one of train, validation"):
        load_samples(f"{tmp_path}:test", samples=1, seed=0)


MAPPING = {
    "n01440764": "tench, Tinca tinca",
    "n02012849": "crane",
    "n03126707": "crane",
    "n03710637": "maillot",
    "n03710721": "maillot, tank suit",
}


def imagenet(root: Path, mapping: str) -> Path:
    """The folders of the ILSVRC archive on Kaggle."""
    data = root / "ILSVRC" / "Data" / "CLS-LOC"
    made.pictures(data, [f"train/{synset}/{synset}_1.JPEG" for synset in MAPPING])
    made.pictures(data / "val", [f"ILSVRC2012_val_0000000{number}.JPEG" for number in range(5)])
    lines = {
        "LOC_synset_mapping.txt": "\n".join(f"{synset} {words}" for synset, words in MAPPING.items()),
        "words.txt": "\n".join(f"{synset}\t{words}" for synset, words in MAPPING.items()),
        "map_clsloc.txt": "\n".join(
            f"{synset} {number + 1} {words.split(',')[0]}" for number, (synset, words) in enumerate(MAPPING.items())
        ),
    }
    (root / mapping).write_text(lines[mapping] + "\n")
    return root


@pytest.mark.parametrize("mapping", ["LOC_synset_mapping.txt", "words.txt", "map_clsloc.txt"])
def test_imagenet_classes_get_their_names(mapping: str, tmp_path: Path) -> None:
    drawn = load_samples(imagenet(tmp_path, mapping), samples=None, seed=0)
    last = (
        ["maillot (n03710637)", "maillot (n03710721)"]
        if mapping == "map_clsloc.txt"
        else ["maillot", "maillot, tank suit"]
    )
    assert drawn.classes == ("tench", "crane (n02012849)", "crane (n03126707)", *last)
    assert [sample.label for sample in drawn.samples] == list(drawn.classes)


def test_imagenet_validation_set(tmp_path: Path) -> None:
    root = imagenet(tmp_path, "LOC_synset_mapping.txt")
    synsets = [list(MAPPING)[number] for number in (2, 0, 1, 3, 4)]
    rows = [
        f"ILSVRC2012_val_0000000{number},{synset} 1 2 3 4 {synset} 5 6 7 8" for number, synset in enumerate(synsets)
    ]
    (root / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + "\n".join(reversed(rows)) + "\n")
    drawn = load_samples(f"{root}:val", samples=None, seed=0)
    assert drawn.classes == load_samples(root, samples=None, seed=0).classes
    assert [drawn.classes.index(sample.label or "") for sample in drawn.samples] == [2, 0, 1, 3, 4]


def test_synsets_without_a_mapping_stay(tmp_path: Path) -> None:
    made.pictures(tmp_path, ["n01440764/a.JPEG", "n02012849/b.JPEG"])
    assert load_samples(tmp_path, samples=None, seed=0).classes == ("n01440764", "n02012849")


def test_images_alone(tmp_path: Path) -> None:
    made.pictures(tmp_path, ["b.png", "a.gif"])
    (tmp_path / "notes.pdf").write_bytes(b"x")
    (tmp_path / ".hidden.png").write_bytes(b"x")
    drawn = load_samples(tmp_path, samples=None, seed=0)
    assert [(sample.text, sample.label) for sample in drawn.samples] == [(None, None)] * 2
    assert made.shows(drawn.samples[0], 1)
    assert drawn.classes is None


def test_metadata_of_a_split(tmp_path: Path) -> None:
    for split in ("train", "test"):
        made.pictures(tmp_path / split, ["a.png"])
        made.write_lines(tmp_path / split / "metadata.jsonl", [{"file_name": "a.png", "text": split}])
    assert load_samples(tmp_path, samples=1, seed=0).samples[0].text == "train"
    assert load_samples(f"{tmp_path}:test", samples=1, seed=0).samples[0].text == "test"


def test_a_classifier_with_other_names_goes_by_the_order_of_the_folders(tmp_path: Path) -> None:
    made.pictures(tmp_path, ["ant/1.png", "bee/2.png", "bee/3.png"])
    drawn = load_samples(tmp_path, samples=None, seed=0)
    for names, numbers in ((["LABEL_0", "LABEL_1"], [0, 1, 1]), (["Bee", "ant"], [1, 0, 0])):
        model, processor = pico.vit(names)
        (batch,) = make_batches(drawn, model, processor, batch_size=4)
        assert batch["labels"].tolist() == numbers
    model, processor = pico.vit(["LABEL_0", "LABEL_1", "LABEL_2"])
    with pytest.raises(CalibrationError, match="label 'ant' is none of the model's 3 classes"):
        make_batches(drawn, model, processor, batch_size=4)
