"""A network as towers of blocks of layers: find them, load and save it, run it block by block, replayed or perturbed.

Knows ``support`` and ``errors`` alone: nothing of data, scores or pruning. Public:
:func:`~ecoflap.model.anatomy.discover`, :class:`~ecoflap.model.parts.Anatomy`, :func:`~ecoflap.model.checkpoint.load`,
:func:`~ecoflap.model.save.save`.
"""
