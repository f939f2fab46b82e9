"""Scenes of the embedded VLM: one to four coloured shapes on a 2 x 2 grid, drawn at 64 pixels.

Everything is a function of a :class:`random.Random`; nothing here needs torch or numpy. Train and test scenes are
separated by content: a hash of the objects decides the side, so that no test scene can equal a train scene.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image, ImageDraw

PICTURE_SIZE = 64
GRID = 2
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (225, 30, 30),
    "green": (30, 160, 40),
    "blue": (40, 50, 230),
    "black": (15, 15, 15),
    "gray": (128, 128, 128),
    "teal": (0, 140, 140),
    "brown": (150, 70, 30),
    "yellow": (240, 220, 30),
}
SHAPES = ("circle", "rectangle", "triangle", "star")
ROWS = ("top", "bottom")
COLUMNS = ("left", "right")
SPLITS = ("train", "test")
_OVERSAMPLING = 3
_TEST_SHARE = 8  # one content in eight belongs to the test split


@dataclass(frozen=True, order=True)
class Thing:
    """One object: grid cell, shape and colour. Ordering is reading order."""

    row: int
    column: int
    color: str
    shape: str

    @property
    def place(self) -> str:
        """The cell in words, for example ``top left``."""
        return f"{ROWS[self.row]} {COLUMNS[self.column]}"

    @property
    def words(self) -> tuple[str, str, str, str]:
        """Row, column, colour, shape."""
        return ROWS[self.row], COLUMNS[self.column], self.color, self.shape

    @property
    def name(self) -> str:
        """The thing as one compound word, for example ``top_left_red_star``."""
        return "_".join(self.words)


@dataclass(frozen=True)
class Scene:
    """Things in reading order; no two share a cell, or both colour and shape."""

    things: tuple[Thing, ...]

    @property
    def split(self) -> str:
        """``train`` or ``test``: a property of the content, whatever the seed that drew it."""
        digest = hashlib.sha256(repr([thing.words for thing in self.things]).encode()).digest()
        return "test" if digest[0] % _TEST_SHARE == 0 else "train"

    @property
    def caption(self) -> str:
        """For example ``a red circle at top left and a blue star at bottom right``."""
        return " and ".join(f"a {thing.color} {thing.shape} at {thing.place}" for thing in self.things)


def all_things() -> list[Thing]:
    """Every possible thing: 4 cells x 8 colours x 4 shapes."""
    cells = [(row, column) for row in range(GRID) for column in range(GRID)]
    return [Thing(row, column, color, shape) for row, column in cells for color in COLORS for shape in SHAPES]


def sample_scene(rng: random.Random, split: str, counts: tuple[int, ...] = (1, 2, 2, 3, 3, 4)) -> Scene:
    """Draw a scene of ``split`` whose number of things is drawn from ``counts``.

    Colours and shapes come from a small palette of the scene, so that things often share one of the two: otherwise
    naming either would identify a thing, and no question would need both.
    """
    while True:
        count = rng.choice(counts)
        colors = rng.sample(tuple(COLORS), rng.choice((2, 3, 3)))
        shapes = rng.sample(SHAPES, rng.choice((2, 2, 3)))
        looks = rng.sample([(color, shape) for color in colors for shape in shapes], count)
        cells = rng.sample(range(GRID * GRID), count)
        things = (
            Thing(cell // GRID, cell % GRID, color, shape) for cell, (color, shape) in zip(cells, looks, strict=True)
        )
        scene = Scene(tuple(sorted(things)))
        if scene.split == split:
            return scene


def sample_scenes(seed: int, split: str, count: int) -> list[Scene]:
    """``count`` scenes of ``split`` drawn from ``seed``; repeated contents are possible (their drawings differ)."""
    rng = random.Random(f"scenes/{split}/{seed}")
    return [sample_scene(rng, split) for _ in range(count)]


def render(scene: Scene, rng: random.Random) -> tuple[Image.Image, Image.Image]:
    """Draw ``scene`` with jitter of place, size, turn and colour.

    Returns the RGB picture and an ``L`` picture of the same 64 x 64 pixels whose value is 0 on the background and
    ``1 + k`` on the k-th thing in reading order.
    """
    background = tuple(rng.randint(225, 250) for _ in range(3))
    large = PICTURE_SIZE * _OVERSAMPLING
    picture = Image.new("RGB", (large, large), background)
    labels = Image.new("L", (PICTURE_SIZE, PICTURE_SIZE), 0)
    pen, label_pen = ImageDraw.Draw(picture), ImageDraw.Draw(labels)
    cell = PICTURE_SIZE / GRID
    for index, thing in enumerate(scene.things):
        radius = rng.uniform(9.5, 14.0)
        slack = cell / 2 - radius
        x = (thing.column + 0.5) * cell + rng.uniform(-slack, slack)
        y = (thing.row + 0.5) * cell + rng.uniform(-slack, slack)
        base = COLORS[thing.color]
        fill = tuple(min(255, max(0, channel + rng.randint(-14, 14))) for channel in base)
        outline = _OUTLINES[thing.shape](x, y, radius, rng)
        pen.polygon([(px * _OVERSAMPLING, py * _OVERSAMPLING) for px, py in outline], fill=fill)
        label_pen.polygon(outline, fill=index + 1)
    return picture.resize((PICTURE_SIZE, PICTURE_SIZE), Image.Resampling.BOX), labels


Outline = list[tuple[float, float]]


def _circle(x: float, y: float, radius: float, rng: random.Random) -> Outline:
    return _around(x, y, [radius * 0.92] * 24, 0.0)


def _rectangle(x: float, y: float, radius: float, rng: random.Random) -> Outline:
    # The corner lies on the circle of the radius; the angle of the corner sets the aspect ratio.
    corner = rng.uniform(0.55, 1.0)
    dx, dy = radius * math.cos(corner), radius * math.sin(corner)
    if rng.random() < 0.5:
        dx, dy = dy, dx
    return [(x - dx, y - dy), (x + dx, y - dy), (x + dx, y + dy), (x - dx, y + dy)]


def _triangle(x: float, y: float, radius: float, rng: random.Random) -> Outline:
    return _around(x, y, [radius] * 3, rng.uniform(-0.3, 0.3) - math.pi / 2)


def _star(x: float, y: float, radius: float, rng: random.Random) -> Outline:
    return _around(x, y, [radius, radius * 0.42] * 5, rng.uniform(-0.3, 0.3) - math.pi / 2)


def _around(x: float, y: float, radii: list[float], turn: float) -> Outline:
    step = 2 * math.pi / len(radii)
    return [(x + r * math.cos(turn + k * step), y + r * math.sin(turn + k * step)) for k, r in enumerate(radii)]


_OUTLINES: dict[str, Callable[[float, float, float, random.Random], Outline]] = {
    "circle": _circle,
    "rectangle": _rectangle,
    "triangle": _triangle,
    "star": _star,
}
