"""Checks paths and data of a training before a model is loaded; imports none of transformers' models."""

from __future__ import annotations

from ecoflap.data.class_names import class_names, class_templates
from ecoflap.data.sources import check_source
from ecoflap.model.files import check_place
from ecoflap.run.checks import check_training_data
from ecoflap.run.evaluations import check_evaluations
from ecoflap.run.finetune.recipe import EMBEDDED, Finetune


def check_finetune(recipe: Finetune) -> None:
    """Check a resolved recipe without a model: where its models and data are, and the columns of the data.

    Raises:
        EcoflapError: a subclass says what is wrong and how to fix it.
    """
    class_names(recipe.classes), class_templates(recipe.class_prompts)
    for source in (recipe.train, recipe.validation):
        check_source(source, recipe.image_folder)
    for entry in check_evaluations(recipe):
        check_source(entry.test, entry.image_folder)
    models = (recipe.source if recipe.model is not None else None, recipe.dense if recipe.dense_is_asked else None)
    for place in models:
        if place not in (None, EMBEDDED):
            check_place(str(place))
    check_training_data(recipe)
