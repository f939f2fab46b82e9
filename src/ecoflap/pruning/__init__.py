"""Stage 2: the walk through the blocks, and the criteria, one per file.

Imports ``importance`` and the folders below; criteria know no files or devices. Public:
:func:`~ecoflap.pruning.prune.prune_layers`, :class:`~ecoflap.pruning.criteria.Criterion`.
"""
