"""Questions about scenes, each with its answer and kind; balanced so that the question alone says little.

Kinds: ``count``, ``exists``, ``attribute``, ``position``, ``relation`` (yes or no) and ``neighbor`` (an attribute of
the only thing on one side of another).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from embedded_vlm.scenes import COLORS, GRID, SHAPES, Scene, Thing, all_things

CAPTION_PROMPT = "A picture of"
PROMPT = "Question: {question} Short answer:"
SIDES: dict[str, Callable[[Thing, Thing], bool]] = {
    "left of": lambda a, b: a.column < b.column,
    "right of": lambda a, b: a.column > b.column,
    "above": lambda a, b: a.row < b.row,
    "below": lambda a, b: a.row > b.row,
}


@dataclass(frozen=True)
class Question:
    """A question, its answer and its kind (``scenes/count``, ``easy-vqa/shape``, ...)."""

    question: str
    answer: str
    kind: str

    @property
    def prompt(self) -> str:
        """What the language model reads: the caption prompt, or the question in BLIP-2's VQA template."""
        return self.question if self.question == CAPTION_PROMPT else PROMPT.format(question=self.question)


def ask(scene: Scene, kind: str, rng: random.Random) -> Question | None:
    """A question of ``kind`` about ``scene``, or None where the scene allows none (a relation needs two things).

    Raises KeyError if the kind is unknown.
    """
    pair = _KINDS[kind](scene, rng)
    return None if pair is None else Question(*pair, kind=f"scenes/{kind}")


def ask_any(scene: Scene, rng: random.Random) -> Question:
    """A question of a random kind among those that the scene allows."""
    while True:
        question = ask(scene, rng.choice(KINDS), rng)
        if question is not None:
            return question


def caption(scene: Scene) -> Question:
    """The scene's caption as an answer to the caption prompt."""
    return Question(CAPTION_PROMPT, scene.caption, "scenes/caption")


def _count(scene: Scene, rng: random.Random) -> tuple[str, str]:
    if rng.random() < 0.2:
        return "how many objects are there?", str(len(scene.things))
    # The wanted number first, then a colour or shape that has it: numbers stay balanced.
    options: dict[int, list[str]] = {}
    for color in COLORS:
        options.setdefault(sum(t.color == color for t in scene.things), []).append(f"{color} objects")
    for shape in SHAPES:
        options.setdefault(sum(t.shape == shape for t in scene.things), []).append(f"{shape}s")
    number = rng.choice(sorted(options))
    return f"how many {rng.choice(options[number])} are there?", str(number)


def _exists(scene: Scene, rng: random.Random) -> tuple[str, str]:
    present = [(t.color, t.shape) for t in scene.things]
    if rng.random() < 0.5:
        color, shape = rng.choice(present)
        return f"is there a {color} {shape}?", "yes"
    # Colours and shapes of the scene in the wrong pairing, where there is one: only binding tells them apart.
    swapped = [(c, s) for c, _ in present for _, s in present if (c, s) not in present]
    if not swapped or rng.random() < 0.3:
        color, shape = rng.choice(present)
        swapped = [(c, shape) for c in COLORS if (c, shape) not in present]
        swapped += [(color, s) for s in SHAPES if (color, s) not in present]
    color, shape = rng.choice(swapped)
    return f"is there a {color} {shape}?", "no"


def _attribute(scene: Scene, rng: random.Random) -> tuple[str, str]:
    options = []
    for thing in scene.things:
        if sum(t.shape == thing.shape for t in scene.things) == 1:
            options.append((f"what color is the {thing.shape}?", thing.color))
        if sum(t.color == thing.color for t in scene.things) == 1:
            options.append((f"what shape is the {thing.color} object?", thing.shape))
        options.append((f"what color is the object at {thing.place}?", thing.color))
        options.append((f"what shape is the object at {thing.place}?", thing.shape))
    return rng.choice(options)


def _position(scene: Scene, rng: random.Random) -> tuple[str, str]:
    thing = rng.choice(scene.things)
    return f"where is the {thing.color} {thing.shape}?", thing.place


def _relation(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    if len(scene.things) < 2:
        return None
    wanted = rng.random() < 0.5
    options = [
        f"is the {a.color} {a.shape} {side} the {b.color} {b.shape}?"
        for a in scene.things
        for b in scene.things
        for side, holds in SIDES.items()
        if a != b and holds(a, b) == wanted
    ]
    return rng.choice(options), "yes" if wanted else "no"


def _neighbor(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    options = []
    for thing in scene.things:
        for side, holds in SIDES.items():
            others = [t for t in scene.things if t != thing and holds(t, thing)]
            if len(others) == 1:
                options.append((f"what color is the object {side} the {thing.color} {thing.shape}?", others[0].color))
                options.append((f"what shape is the object {side} the {thing.color} {thing.shape}?", others[0].shape))
    return rng.choice(options) if options else None


_KINDS: dict[str, Callable[[Scene, random.Random], tuple[str, str] | None]] = {
    "count": _count,
    "exists": _exists,
    "attribute": _attribute,
    "position": _position,
    "relation": _relation,
    "neighbor": _neighbor,
}
KINDS = tuple(_KINDS)


def vocabulary_samples() -> list[str]:
    """Texts that together hold every word of scene questions, answers, captions and descriptions."""
    colors, shapes = " ".join(COLORS), " ".join(SHAPES)
    plural = " ".join(f"{shape}s" for shape in SHAPES)
    numbers = " ".join(str(n) for n in range(GRID * GRID + 1))
    return [
        f"{colors} {shapes} {plural} {numbers} {' '.join(SIDES)} yes no top bottom left right . , ?",
        "how many objects are there? is there a what color is the what shape is the object at where is the",
        " ".join(thing.name for thing in all_things()),
        f"{CAPTION_PROMPT} {PROMPT.format(question='')} a and at",
    ]
