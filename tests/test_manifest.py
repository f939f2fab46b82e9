"""What a run wrote and nothing else is removed; what another process left since one looked is not, either."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ecoflap.errors import InvalidOption, OutputExists
from ecoflap.run.directory import RunDirectory
from ecoflap.run.manifest import Manifest
from ecoflap.run.names import MANIFEST, OURS
from ecoflap.run.recipe import Recipe
from ecoflap.run.versions import versions

RECIPE = Recipe().resolved()


def begun(folder: Path, *, overwrite: bool = False, resume: bool = False, recipe: Recipe = RECIPE) -> RunDirectory:
    run = RunDirectory.examine(folder, recipe, overwrite=overwrite, resume=resume)
    run.begin(recipe, "f" * 64, {})
    return run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run that has ended, with a model, a picture and a page."""
    path = tmp_path / "run"
    with begun(path) as run:
        run.results.write("importance.json", {"layers": []})
        run.write("metrics.json", {})
        for name in ("model/", "pictures/"):
            with run.manifest.writing(name):
                (path / name).mkdir()
                (path / name / "one.bin").write_bytes(b"ours")
        (path / "log.txt").write_text("begins")
        run.finish()
    return path


def test_a_file_that_is_written_later_takes_no_file_of_the_users(folder: Path) -> None:
    (folder / "bench.json").write_bytes(b"mine")
    with pytest.raises(OutputExists, match=r"bench.json was not written by ecoflap"):
        Manifest(folder).check_own("bench.json")
    with pytest.raises(OutputExists, match=r"bench\.json"), Manifest(folder).writing("bench.json"):
        pytest.fail("it would be replaced")
    (folder / "bench.json").unlink()
    for _ in range(2):  # its own it replaces
        with Manifest(folder).writing("bench.json"):
            (folder / "bench.json").write_bytes(b"ours")


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    "name", ["pictures/holiday.png", "model/dense.safetensors", "analysis/thesis.txt", "journal/notes.txt"]
)
def test_a_file_of_the_users_inside_a_run_is_never_removed(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"mine")
    before = everything(folder)
    with pytest.raises(OutputExists, match=rf"{name} was changed after ecoflap wrote it"):
        begun(folder, overwrite=True)
    assert everything(folder) == before
    (folder / name).unlink()
    begun(folder, overwrite=True).close()
    assert sorted(everything(folder)) == ["journal/inputs.json", MANIFEST, "recipe.yaml"]


@pytest.mark.parametrize("name", ["importance.json", "model/one.bin"])
def test_a_file_that_the_user_changed_is_never_removed(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"edit")
    with pytest.raises(OutputExists, match=name):
        begun(folder, overwrite=True)
    assert (folder / name).read_bytes() == b"edit"


def test_a_link_in_place_of_a_file_is_never_removed(folder: Path, tmp_path: Path) -> None:
    (folder / "model" / "one.bin").rename(tmp_path / "kept.bin")
    (folder / "model" / "one.bin").symlink_to(tmp_path / "kept.bin")
    with pytest.raises(OutputExists, match=r"one\.bin"):
        begun(folder, overwrite=True)


def test_a_folder_with_any_recipe_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "dense.safetensors").write_bytes(b"mine")
    recipe = {**RECIPE.to_dict(), "versions": versions(), "fingerprint": "f" * 64}
    for content in ("flour: 200 g", yaml.safe_dump(recipe), "[broken"):
        (tmp_path / "recipe.yaml").write_text(content)
        with pytest.raises(OutputExists):
            begun(tmp_path, overwrite=True)
    assert (tmp_path / "model" / "dense.safetensors").read_bytes() == b"mine"


def test_a_copied_run_is_known_by_its_digests(folder: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(folder, copy, copy_function=shutil.copyfile)  # other times
    begun(copy, overwrite=True).close()


@given(when=st.sampled_from(["before", "after"]))
def test_what_a_kill_left_in_between_is_ours(tmp_path_factory: pytest.TempPathFactory, when: str) -> None:
    path = tmp_path_factory.mktemp("killed") / "run"
    run = begun(path)
    run.manifest.expect("model/", "metrics.json")
    if when == "after":
        (path / "model").mkdir()
        (path / "model" / "one.bin").write_bytes(b"ours")
        (path / "metrics.json").write_text("{}")
    run.close()
    begun(path, overwrite=True).close()
    assert not (path / "model").exists()
    (path / "recipe.yaml").unlink()  # killed between the mark and the recipe
    (path / "journal" / "inputs.json").unlink()
    (path / "journal").rmdir()
    begun(path).close()


@pytest.mark.parametrize("field", ["image_folder", "test_image_folder", "calibration", "classes", "model", "test"])
@pytest.mark.parametrize("place", ["pictures", "notes.txt"])
def test_inputs_inside_the_output_are_refused_before_anything_happens(folder: Path, field: str, place: str) -> None:
    (folder / "notes.txt").write_text("mine")
    value = str(folder / place)
    recipe = Recipe.parse({field: [value] if field == "classes" else value}).resolved()
    before = everything(folder)
    with pytest.raises(InvalidOption, match=rf"{field} .* is part of"):
        RunDirectory.examine(folder, recipe, overwrite=True)
    entry = {"task": "vqa", "image_folder": value}
    with pytest.raises(InvalidOption, match=r"evaluations vqa image_folder .* is part of"):
        RunDirectory.examine(folder, Recipe.parse({"evaluations": [entry]}).resolved(), overwrite=True)
    assert everything(folder) == before


def test_another_process_that_began_and_ended_in_between_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "run"
    late = RunDirectory.examine(path, RECIPE)  # looks, and sees an empty place
    with begun(path) as first:
        first.write("metrics.json", {"first": 1})
        first.finish()
    before = everything(path)
    with pytest.raises(OutputExists, match="already holds a run"):
        late.begin(RECIPE, "f" * 64, {})
    late.close()
    assert everything(path) == before
    # One that may replace a run looks at what it replaces when it does.
    late = RunDirectory.examine(path, RECIPE, overwrite=True)
    (path / "model").mkdir()
    (path / "model" / "mine.txt").write_text("mine")
    with pytest.raises(OutputExists, match=r"mine\.txt"):
        late.begin(RECIPE, "f" * 64, {})
    late.close()
    assert (path / "model" / "mine.txt").read_text() == "mine"


def test_half_a_removed_journal_goes_at_the_end(folder: Path) -> None:
    (folder / ".journal.old").mkdir()  # killed while the journal was removed
    (folder / ".journal.old" / "stages.json").write_text("[]")
    run = RunDirectory(folder)
    run.finish()
    assert not (folder / ".journal.old").exists()


def test_the_manifest_holds_digests(folder: Path) -> None:
    files = json.loads((folder / MANIFEST).read_text())["data"]["files"]
    assert set(files) == {"importance.json", "metrics.json", "model/one.bin", "pictures/one.bin"}
    assert all(len(entry["sha256"]) == 64 for entry in files.values())
    assert list(Manifest(folder).foreign_files(OURS)) == []


@pytest.mark.parametrize("name", ["checkpoints/checkpoint-2", "search/checkpoint-4", "trainings/upop_0.5_seed0/model"])
def test_what_a_trainer_left_when_it_was_stopped_is_ours(tmp_path: Path, name: str) -> None:
    """Its files are of many kinds and change while it goes on: --overwrite removes them all the same."""
    manifest = Manifest(tmp_path)
    manifest.begin()
    kept = tmp_path / "journal" / name
    kept.mkdir(parents=True)
    (kept / "optimizer.pt").write_bytes(b"one")
    assert list(manifest.foreign_files(OURS)) == []
    (tmp_path / "journal" / "thesis.pt").write_bytes(b"mine")
    assert list(manifest.foreign_files(OURS)) == ["journal/thesis.pt"]
