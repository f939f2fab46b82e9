"""Stage 2: the walk through the blocks, and the criteria, one in each file.

Imports ``importance`` and what stands below; criteria know no files or devices. Public:
:func:`~ecoflap.pruning.prune.prune_layers`, :class:`~ecoflap.pruning.criteria.Criterion`.
"""
