"""Runs one recipe in one directory, so that it can be resumed after a stop; ``compare/`` runs many of them.

Imports everything but ``report`` and ``cli``. Public: :class:`~ecoflap.run.recipe.Recipe`,
:func:`~ecoflap.run.pipeline.run_recipe`, :class:`~ecoflap.run.directory.RunDirectory`.
"""
