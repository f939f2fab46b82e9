"""One recipe carried out in one directory, so that it can go on after it was stopped; ``compare/`` is many of them.

Knows everything but ``report`` and ``cli``. Public: :class:`~ecoflap.run.recipe.Recipe`,
:func:`~ecoflap.run.pipeline.run_recipe`, :class:`~ecoflap.run.directory.RunDirectory`.
"""
