"""Checks the cells of a grid before the work: mistakes are raised, cells that can't be made are recorded."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ecoflap.data.sources import check_source
from ecoflap.errors import EcoflapError, InfeasibleAllocation, InvalidOption
from ecoflap.run.checks import check_data, check_places, check_recipe, check_training_data, needs_data
from ecoflap.run.compare.recipe import Grid, Place
from ecoflap.run.compare.trained import training_recipe
from ecoflap.run.evaluations import evaluations_of
from ecoflap.run.recipe import Recipe

if TYPE_CHECKING:
    from ecoflap.run.prepare import Prepared

Group = tuple[int, int]  # seed and number of calibration samples: cells with the same two share their batches


def group_of(recipe: Recipe) -> Group:
    """The group of a cell; its cells share calibration batches."""
    return recipe.seed, recipe.samples


@dataclass
class Plans:
    """The cells of a grid.

    Attributes:
        recipes: of the cells that can be made, as far as is known.
        errors: the reason for each of the others.
    """

    recipes: dict[Place, Recipe] = field(default_factory=dict)
    errors: dict[Place, EcoflapError] = field(default_factory=dict)

    def drop(self, place: Place, error: EcoflapError) -> None:
        """Record that the cell can't be made."""
        self.recipes.pop(place, None)
        self.errors[place] = error

    def loader(self, group: Group) -> Recipe:
        """The recipe that loads a group's batches: one that needs calibration data, if there is one."""
        found = [recipe for recipe in self.recipes.values() if group_of(recipe) == group]
        return next(filter(needs_data, found), found[0])

    def rehearse(self, base: Prepared) -> None:
        """Drop the cells, of any seed but ``base``'s number of samples, that can't be allocated on its model."""
        from ecoflap.run.prepare import check_plan

        for place, recipe in list(self.recipes.items()):
            if recipe.samples == base.recipe.samples:
                try:
                    check_plan(plan_of(base, recipe))
                except EcoflapError as error:
                    self.drop(place, error)

    def check_any(self) -> None:
        """Raises the first cell's error if none can be made."""
        if not self.recipes:
            raise next(iter(self.errors.values()))


def planned(grid: Grid) -> Plans:
    """The recipes of all cells, checked without a model.

    Raises:
        InvalidOption, UnknownName: a method can be made at no sparsity, or has an unknown option; or there is no test.
    """
    check_places(grid)
    check_source(grid.calibration, grid.image_folder)
    if not evaluations_of(grid):
        raise InvalidOption("what to compare by? give --task vqa or --task perplexity, and its data as --test FILE")
    if grid.values:
        from ecoflap.run.compare.stored import check_forms

        check_forms(grid.values)
    for place in grid.places():
        if place.method.trains:
            check_training_data(training_recipe(grid, place))  # raises if it can't be made
    plans = Plans()
    for place in grid.places():
        try:
            plans.recipes[place] = grid.recipe_of(place)
        except EcoflapError as error:
            plans.drop(place, error)
            continue
        try:
            check_recipe(plans.recipes[place])
        except InfeasibleAllocation as error:
            plans.drop(place, error)
        except EcoflapError as error:
            raise _named(place, error) from error
    for place, refusal in plans.errors.items():
        hopeless = not any(other.method == place.method for other in plans.recipes)
        if hopeless and not isinstance(refusal, InfeasibleAllocation):
            raise _named(place, refusal) from refusal
    plans.check_any()
    check_data(grid)
    return plans


def _named(place: Place, error: EcoflapError) -> EcoflapError:
    start = f"method '{place.method.name}'"
    return error if str(error).startswith(start) else type(error)(f"{start}: {error}")


def plan_of(base: Prepared, recipe: Recipe) -> Prepared:
    """The plan of one cell, on the model and batches of its group."""
    from ecoflap.importance.scores import Importance

    scores = Importance.load(recipe.importance) if recipe.importance.endswith(".json") else None
    recipe = recipe.model_copy(update={"compute_dtype": base.recipe.compute_dtype})
    return replace(base, recipe=recipe, importance=scores, allocation=None)
