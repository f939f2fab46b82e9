"""Captions in the formats that COCO, NoCaps, Karpathy, Flickr30k, LAVIS and CC3M are published in."""

from pathlib import Path

import made
import pytest

from ecoflap.data import load_samples
from ecoflap.errors import CalibrationError


def coco(root: Path) -> Path:
    names = [f"{number:012d}.jpg" for number in (9, 25, 30)]
    made.pictures(root / "train2017", names)
    images = [
        {"license": 1, "file_name": name, "coco_url": f"http://images.cocodataset.org/train2017/{name}", "id": number}
        for name, number in zip(names, (9, 25, 30), strict=True)
    ]
    notes = [
        {"image_id": number, "id": 10 * number + k, "caption": f"picture {number} said {k}"}
        for k in range(2)
        for number in (30, 9, 25)
    ]
    document = {"info": {"year": 2017}, "licenses": [{"id": 1}], "images": images, "annotations": notes}
    for split in ("train2017", "val2017"):
        made.write_json(
            root / "annotations" / f"instances_{split}.json", {"images": images, "annotations": [{"bbox": 1}]}
        )
        made.write_json(root / "annotations" / f"captions_{split}.json", document)
    return root


@pytest.mark.parametrize("given", ["", "annotations/captions_train2017.json", ":val2017"])
def test_coco(given: str, tmp_path: Path) -> None:
    root = coco(tmp_path / "coco")
    drawn = load_samples(f"{root}{given}" if given.startswith(":") else root / given, samples=None, seed=0)
    assert [sample.group for sample in drawn.samples] == ["9", "25", "30"]
    for number, sample in enumerate(drawn.samples):
        assert sample.captions == tuple(f"picture {sample.group} said {k}" for k in range(2))
        assert sample.text == sample.captions[0]
        assert made.shows(sample, number)
    assert drawn.columns == {"image": "image", "text": "captions", "group": "image_id"}


def test_coco_boxes_are_no_captions(tmp_path: Path) -> None:
    root = coco(tmp_path / "coco")
    with pytest.raises(CalibrationError, match=r"instances_val2017.json holds no captions but bbox.*captions_\*.json"):
        load_samples(root / "annotations" / "instances_val2017.json", samples=1, seed=0)
    with pytest.raises(CalibrationError, match=r"of split 'test2014': there is captions_train2017.json, captions_val"):
        load_samples(f"{root}:test2014", samples=1, seed=0)


def test_nocaps(tmp_path: Path) -> None:
    made.pictures(tmp_path / "images", ["0013ea2087020901.jpg", "00a159a661a2f5aa.jpg"])
    images = [
        {"id": 0, "open_images_id": "0013ea2087020901", "file_name": "0013ea2087020901.jpg", "domain": "near-domain"},
        {"id": 1, "open_images_id": "00a159a661a2f5aa", "file_name": "00a159a661a2f5aa.jpg", "domain": "in-domain"},
    ]
    notes = [{"image_id": i % 2, "id": i, "caption": f"c{i}"} for i in range(20)]
    file = made.write_json(tmp_path / "nocaps_val_4500_captions.json", {"images": images, "annotations": notes})
    drawn = load_samples(file, samples=None, seed=0).samples
    assert [(s.kind, len(s.captions or ())) for s in drawn] == [("near-domain", 10), ("in-domain", 10)]
    assert made.shows(drawn[1], 1)


def karpathy(root: Path, with_folder: bool) -> Path:
    splits = ("train", "restval", "val", "test", "test")
    made.pictures(root / "val2014", [f"COCO_val2014_{number:012d}.jpg" for number in range(5)])
    images = [
        {
            "filename": f"COCO_val2014_{number:012d}.jpg",
            "imgid": number,
            "split": split,
            "sentences": [{"tokens": ["a"], "raw": f"a {number} {k}", "imgid": number, "sentid": k} for k in range(5)],
            "sentids": [0],
            **({"filepath": "val2014", "cocoid": 100 + number} if with_folder else {}),
        }
        for number, split in enumerate(splits)
    ]
    return made.write_json(root / "dataset_coco.json", {"images": images, "dataset": "coco"})


@pytest.mark.parametrize("with_folder", [True, False])
def test_karpathy(with_folder: bool, tmp_path: Path) -> None:
    file = karpathy(tmp_path, with_folder)
    for source in (f"{file}:test", f"{tmp_path}:test"):
        drawn = load_samples(source, samples=None, seed=0).samples
        assert [s.group for s in drawn] == (["103", "104"] if with_folder else ["3", "4"])
        assert drawn[0].captions == tuple(f"a 3 {k}" for k in range(5))
        assert made.shows(drawn[0], 3)
    assert len(load_samples(file, samples=None, seed=0).samples) == 2  # train, and restval with it
    with pytest.raises(CalibrationError, match=r"no split 'dev': it has restval, test, train, val"):
        load_samples(f"{file}:dev", samples=1, seed=0)


@pytest.mark.parametrize("form", ["token", "csv"])
def test_flickr30k(form: str, tmp_path: Path) -> None:
    names = ["1000092795.jpg", "10002456.jpg"]
    made.pictures(tmp_path / "flickr30k-images", names)
    if form == "token":
        lines = [f'{name}#{k}\tTwo, {name} "quoted {k} .' for name in names for k in range(5)]
        (tmp_path / "results_20130124.token").write_text("\n".join(lines) + "\n")
    else:
        lines = [f'{name}| {k}| Two, {name} "quoted {k} .' for name in names for k in range(5)]
        lines[-1] = f'{names[1]}| 4   Two, {names[1]} "quoted 4 .'  # as in the published file
        (tmp_path / "results.csv").write_text("image_name| comment_number| comment\n" + "\n".join(lines) + "\n")
    file = next(path for path in tmp_path.iterdir() if path.is_file())
    for source in (file, tmp_path):
        drawn = load_samples(source, samples=None, seed=0).samples
        assert [s.group for s in drawn] == ["1000092795", "10002456"]
        assert drawn[1].captions == tuple(f'Two, 10002456.jpg "quoted {k} .' for k in range(5))
        assert made.shows(drawn[1], 1)


def test_flickr_line_that_is_none(tmp_path: Path) -> None:
    file = tmp_path / "results.token"
    file.write_text("1.jpg#0\ta dog\nno image here\n")
    with pytest.raises(
        CalibrationError, match=r"results.token: line 2 is not an image and its caption: 'no image here'"
    ):
        load_samples(file, samples=1, seed=0)


def test_lavis_lists(tmp_path: Path) -> None:
    made.pictures(tmp_path, ["images/val2014/COCO_val2014_000000000042.jpg", "flickr30k-images/7.jpg"])
    train = [{"caption": "one", "image": "val2014/COCO_val2014_000000000042.jpg", "image_id": "coco_42"}]
    drawn = load_samples(made.write_json(tmp_path / "a.json", train), samples=1, seed=0).samples[0]
    assert (drawn.text, drawn.captions, drawn.group) == ("one", None, "coco_42")
    assert made.shows(drawn, 0)
    test = [{"image": "flickr30k-images/7.jpg", "caption": ["one", "two"]}]
    drawn = load_samples(made.write_json(tmp_path / "b.json", test), samples=1, seed=0).samples[0]
    assert (drawn.text, drawn.captions) == ("one", ("one", "two"))
    assert made.shows(drawn, 1)


@pytest.mark.parametrize("header", ["", "caption\turl\n"])
def test_addresses_of_pictures_are_refused(header: str, tmp_path: Path) -> None:
    file = tmp_path / "Train_GCC-training.tsv"
    file.write_text(header + "a very typical bus station\thttp://lh6.ggpht.com/abc.jpg\nsierra\thttp://x.org/1.jpg\n")
    with pytest.raises(
        CalibrationError, match=r"Train_GCC-training.tsv lists addresses of images.*download them first"
    ):
        load_samples(file, samples=1, seed=0)
    if header:
        assert load_samples(file, samples=1, seed=0, columns={"text": "caption"}).samples[0].text


def test_web_pages_have_an_address_and_are_a_text(tmp_path: Path) -> None:
    file = made.write_lines(tmp_path / "a.jsonl", [{"text": "page", "timestamp": "t", "url": "http://x"}])
    assert load_samples(file, samples=1, seed=0).samples[0].text == "page"
    file = made.write_lines(tmp_path / "b.jsonl", [{"id": 1, "url": "http://x", "title": "T", "text": "page"}])
    assert load_samples(file, samples=1, seed=0).samples[0].text == "page"


def test_pictures_lie_where_the_user_says(tmp_path: Path) -> None:
    made.pictures(tmp_path / "far" / "away", ["a.jpg"])
    file = made.write_json(tmp_path / "notes" / "a.json", [{"image": "a.jpg", "caption": "x"}])
    with pytest.raises(CalibrationError, match=r"no image file '.*notes/a.jpg'"):
        load_samples(file, samples=1, seed=0)
    drawn = load_samples(file, samples=1, seed=0, image_folder=tmp_path / "far" / "away")
    assert made.shows(drawn.samples[0], 0)
    with pytest.raises(CalibrationError, match=r"the image folder .*nosuch is not there"):
        load_samples(file, samples=1, seed=0, image_folder=tmp_path / "nosuch")


@pytest.mark.parametrize("name", ["http://x.org/a.jpg", "//server/share/a.jpg", "\\\\server\\a.jpg", "s3://b/a.jpg"])
def test_nothing_is_fetched_from_the_network(name: str, tmp_path: Path) -> None:
    file = made.write_json(tmp_path / "a.json", [{"image": name, "caption": "x"}])
    with pytest.raises(CalibrationError, match=r"address on the network, which is not fetched"):
        load_samples(file, samples=1, seed=0)
