"""A network as towers of blocks of layers: finds them, loads and saves models, runs them block by block.

Imports only ``support`` and ``errors``: nothing of data, scores or pruning. Public:
:func:`~ecoflap.model.anatomy.discover`, :class:`~ecoflap.model.parts.Anatomy`, :func:`~ecoflap.model.checkpoint.load`,
:func:`~ecoflap.model.save.save`.
"""
