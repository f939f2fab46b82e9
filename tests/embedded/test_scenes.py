"""Scenes and questions: deterministic, disjoint splits, answers that a second reading of the scene confirms."""

from __future__ import annotations

import random
import re

import pytest
from embedded_vlm.questions import KINDS, ask, ask_any, caption
from embedded_vlm.scenes import COLORS, COLUMNS, ROWS, SHAPES, Scene, Thing, render, sample_scene, sample_scenes

PLURALS = {f"{shape}s": shape for shape in SHAPES}


def cells(scene: Scene) -> list[dict[str, str | int]]:
    return [{"x": t.column, "y": t.row, "color": t.color, "shape": t.shape} for t in scene.things]


def expected(question: str, scene: Scene) -> str:
    """The answer, found from the words of the question and a list of the objects: no code of the generator."""
    things = cells(scene)
    words = question.rstrip("?").split()

    def matching(tokens: list[str]) -> list[dict[str, str | int]]:
        singular = [PLURALS.get(token, token) for token in tokens]
        wanted = [token for token in singular if token in COLORS or token in SHAPES]
        return [t for t in things if all(token in (t["color"], t["shape"]) for token in wanted)]

    if words[:2] == ["how", "many"]:
        return str(len(matching(words)))
    if words[:2] == ["is", "there"]:
        return "yes" if matching(words) else "no"
    if words[0] == "where":
        (only,) = matching(words)
        return f"{'top' if only['y'] == 0 else 'bottom'} {'left' if only['x'] == 0 else 'right'}"
    side = re.search(r" (left of|right of|above|below) the ", question)
    if side:
        axis, sign = {"left of": ("x", -1), "right of": ("x", 1), "above": ("y", -1), "below": ("y", 1)}[side[1]]
        (anchor,) = matching(question[side.end() :].rstrip("?").split())
        beyond = [t for t in things if sign * (int(t[axis]) - int(anchor[axis])) > 0]
        if words[0] == "is":
            (subject,) = matching(question[: side.start()].split())
            return "yes" if subject in beyond else "no"
        (only,) = beyond
        return str(only[words[1]])
    place = re.search(r"at (top|bottom) (left|right)", question)
    if place:
        at = (COLUMNS.index(place[2]), ROWS.index(place[1]))
        (only,) = [t for t in things if (t["x"], t["y"]) == at]
    else:
        (only,) = matching(words[2:])
    return str(only[words[1]])


@pytest.mark.parametrize("kind", KINDS)
def test_answers_agree_with_a_second_reading(kind: str) -> None:
    rng = random.Random(5)
    asked = 0
    for scene in sample_scenes(11, "train", 800):
        question = ask(scene, kind, rng)
        if question is not None:
            asked += 1
            assert question.kind == f"scenes/{kind}"
            assert question.answer == expected(question.question, scene), (question, scene)
    assert asked > 300


def test_same_seed_same_scenes_and_pictures() -> None:
    first, again, other = (sample_scenes(seed, "train", 50) for seed in (3, 3, 4))
    assert first == again
    assert first != other
    pictures = [render(scene, random.Random(9))[0].tobytes() for scene in first]
    assert pictures == [render(scene, random.Random(9))[0].tobytes() for scene in again]
    assert len(set(pictures)) > 40


def test_train_and_test_scenes_never_meet() -> None:
    train = set(sample_scenes(0, "train", 4000))
    test = set(sample_scenes(1, "test", 4000))
    assert len(test) > 1000
    assert not train & test


def test_scenes_are_well_formed() -> None:
    rng = random.Random(2)
    counts = set()
    for _ in range(500):
        scene = sample_scene(rng, "test")
        counts.add(len(scene.things))
        assert list(scene.things) == sorted(scene.things)
        assert len({(t.row, t.column) for t in scene.things}) == len(scene.things)
        assert len({(t.color, t.shape) for t in scene.things}) == len(scene.things)
    assert counts == {1, 2, 3, 4}


def test_drawing_puts_each_thing_in_its_cell_and_colour() -> None:
    rng = random.Random(8)
    for scene in sample_scenes(21, "train", 60):
        picture, marks = render(scene, rng)
        assert picture.size == marks.size == (64, 64)
        for index, thing in enumerate(scene.things):
            spots = [(x, y) for y in range(64) for x in range(64) if marks.getpixel((x, y)) == index + 1]
            x = sum(spot[0] for spot in spots) / len(spots)
            y = sum(spot[1] for spot in spots) / len(spots)
            assert (int(y // 32), int(x // 32)) == (thing.row, thing.column)
            red, green, blue = picture.getpixel((round(x), round(y)))
            assert all(abs(a - b) <= 16 for a, b in zip((red, green, blue), COLORS[thing.color], strict=True))


def test_yes_and_no_are_balanced() -> None:
    rng = random.Random(4)
    for kind in ("exists", "relation"):
        answers = [q.answer for s in sample_scenes(6, "train", 1500) if (q := ask(s, kind, rng)) is not None]
        assert 0.42 < answers.count("yes") / len(answers) < 0.58


def test_caption_names_everything() -> None:
    scene = Scene((Thing(0, 0, "red", "circle"), Thing(1, 1, "blue", "star")))
    assert caption(scene).answer == "a red circle at top left and a blue star at bottom right"
    assert ask_any(scene, random.Random(0)).question.endswith("?")
