"""Defines the recipe of a comparison: a run's recipe with lists of methods, sparsities and seeds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

from pydantic import Field, field_validator, model_validator

from ecoflap.errors import InvalidOption
from ecoflap.importance.registry import AUTO
from ecoflap.pruning.registry import DEFAULT
from ecoflap.run.compare.methods import AXES, OF_METHOD, Method, parse_method, split_methods
from ecoflap.run.recipe import Recipe
from ecoflap.support.registry import unknown
from ecoflap.support.text import cut

DEFAULT_METHODS = (
    "magnitude",
    "wanda",
    "sparsegpt",
    "zeroth-order+wanda",
    "zeroth-order+sparsegpt",
    # All samples, since half of them are too few at 0.7; few rounds, so that the grid ends within ten minutes.
    "zeroth-order+sparsegpt:search=true,search_options=rounds=3",
    "admm",
    "gradient-norm+admm",
)
FORMS = ("auto", "bfloat16", "int8", "int4", "int3", "int2")  # of stored values; the last two for the dense model
MOST = 1000  # sparsities of one grid; more is a typing error
# Fields of a run's recipe that the methods or the grid's axes replace.
UNUSED = frozenset((*AXES, *OF_METHOD, "allocation", "baseline", "pruned")) - {"seed"}


class Grid(Recipe):
    """All fields that decide the result of a comparison.

    ``seed`` is the seed of the evaluation only, so that all cells use the same test samples. The fields importance,
    criterion and sparsity of a recipe file are not read.
    """

    methods: tuple[str, ...] = Field(
        DEFAULT_METHODS,
        description="IMPORTANCE+CRITERION[:NAME=VALUE,...], a criterion alone (one sparsity for all layers) or an "
        f"importance alone (with {DEFAULT}); separated by commas. Default: {', '.join(DEFAULT_METHODS)}.",
    )
    sparsities: tuple[float, ...] = Field(
        (0.5, 0.6, 0.7), description="Such as 0.3:0.7:0.1 (with both ends) or 0.5,0.6. Default: 0.5,0.6,0.7."
    )
    seeds: tuple[int, ...] = Field(
        (0,), description="Of sample choice and noise, such as 0,1,2: the spread over them is shown. Default: 0."
    )

    train: str | None = Field(None, description="Training data of the method upop: file, folder or dataset id.")
    values: tuple[str, ...] = Field(
        (),
        description="Also store every model in these forms, and measure each by its bytes: auto (the checkpoint's "
        "dtype), bfloat16, int8, int4; int3, int2 (dense alone). Pruned models are packed, the dense one is quantised "
        "by torchao. Default: none.",
    )

    @field_validator("values", mode="before")
    @classmethod
    def _known_values(cls, value: Any) -> Any:
        found: dict[str, None] = {}
        for item in value if isinstance(value, list | tuple) else [value]:
            for part in str(item).split(","):
                if (form := part.strip()) not in FORMS:
                    raise unknown("form of values", form, list(FORMS))
                found[form] = None
        return tuple(found)

    @field_validator("methods", mode="before")
    @classmethod
    def _known_methods(cls, value: Any) -> Any:
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
            raise InvalidOption(f"methods: {value!r} is no list of methods such as zeroth-order+wanda")
        names = tuple(dict.fromkeys(parse_method(text).name for text in split_methods(texts)))
        if not names:
            raise InvalidOption("methods: give at least one, such as zeroth-order+wanda")
        return names

    @field_validator("sparsities", mode="before")
    @classmethod
    def _known_sparsities(cls, value: Any) -> Any:
        return parse_sparsities(value if isinstance(value, list | tuple) else [value])

    @field_validator("seeds", mode="before")
    @classmethod
    def _known_seeds(cls, value: Any) -> Any:
        found: dict[int, None] = {}
        for item in value if isinstance(value, list | tuple) else [value]:
            for part in str(item).split(","):
                if not part.strip().isdecimal():
                    raise InvalidOption(f"seeds: '{part.strip()}' is no whole number of at least 0, as in 0,1,2")
                found[int(part)] = None
        if not found:
            raise InvalidOption("seeds: give at least one, such as 0")
        return tuple(found)

    @model_validator(mode="after")
    def _consistent(self) -> Grid:
        if self.allocation is not None:
            raise InvalidOption("allocation: a comparison makes its own allocations: leave it out")
        for field in ("importance_options", "criterion_options"):
            options = getattr(self, field, None)
            if options:
                measure = "zeroth-order" if self.importance == AUTO else self.importance
                pair = next(f"{key}={value}" for key, value in options.items())
                raise InvalidOption(
                    f"{field}: in a comparison they belong to a method, as in {measure}+{DEFAULT}:{pair}"
                )
        return self

    def resolved(self) -> Grid:
        """The grid itself: :meth:`recipe_of` resolves the recipe of each cell."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """All fields that decide something, as plain YAML and JSON types."""
        values = {name: value for name, value in super().to_dict().items() if name not in UNUSED}
        return {**values, "importance_samples": min(self.samples, self.importance_samples)}

    def known_methods(self) -> tuple[Method, ...]:
        """The parsed methods."""
        return tuple(parse_method(name) for name in self.methods)

    def places(self) -> Iterator[Place]:
        """The cells in the order in which they are made, seed by seed."""
        methods = self.known_methods()
        for seed in self.seeds:
            for method in methods:
                for sparsity in self.sparsities:
                    yield Place(method, sparsity, seed)

    def recipe_of(self, place: Place) -> Recipe:
        """The resolved recipe of one cell, as for ``ecoflap prune``.

        Raises:
            EcoflapError: method and sparsity contradict each other or this grid's other fields.
        """
        given = {name: getattr(self, name) for name in self.model_fields_set if name in Recipe.model_fields}
        kept = {name: value for name, value in given.items() if name not in UNUSED}
        cell = {**kept, **place.method.changes(), "sparsity": place.sparsity, "seed": place.seed}
        return Recipe.parse(cell, f"method '{place.method.name}'").resolved()


@dataclass(frozen=True)
class Place:
    """The position of a cell in the grid."""

    method: Method
    sparsity: float
    seed: int

    def __str__(self) -> str:
        return f"{self.method.name} {self.sparsity:g} seed {self.seed}"


def parse_sparsities(values: Sequence[Any]) -> tuple[float, ...]:
    """``0.3:0.7:0.1`` and lists as distinct ascending numbers.

    Steps are decimal numbers, so that 0.3:0.7:0.1 contains 0.6, not 0.6000000000000001, and ends with 0.7.

    Raises:
        InvalidOption: names the part that is wrong.
    """
    found: list[Decimal] = []
    for value in values:
        for part in str(value).split(","):
            found += _steps(part.strip())
    if not found:
        raise InvalidOption("sparsities: give at least one, such as 0.5")
    return tuple(float(number) for number in sorted(set(found)))


def _steps(part: str) -> list[Decimal]:
    if len(part) > 100:
        raise InvalidOption(f"sparsities: '{cut(part)}' is no number and no FROM:TO:STEP, such as 0.3:0.7:0.1")
    try:
        numbers = [Decimal(piece.strip()) for piece in part.split(":")]
    except InvalidOperation:
        numbers = []
    if len(numbers) not in (1, 3) or not all(number.is_finite() for number in numbers):
        raise InvalidOption(f"sparsities: '{part}' is no number and no FROM:TO:STEP, such as 0.3:0.7:0.1")
    first, last, step = numbers if len(numbers) == 3 else (numbers[0], numbers[0], Decimal(1))
    if not 0 <= first < 1 or not 0 <= last < 1:
        raise InvalidOption(f"sparsities: '{part}': a sparsity is at least 0 and below 1")
    if step <= 0 or last < first:
        raise InvalidOption(f"sparsities: '{part}': it must go up, as in 0.3:0.7:0.1")
    if (last - first) / step >= MOST:
        raise InvalidOption(f"sparsities: '{part}' are more than {MOST}: take a larger step")
    return [first + index * step for index in range(int((last - first) / step) + 1)]
