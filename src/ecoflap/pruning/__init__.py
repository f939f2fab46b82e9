"""Stage 2: the walk through the blocks and the criteria, one file each.

Knows ``importance`` and what lies below; criteria know no files or devices. Public:
:func:`~ecoflap.pruning.prune.prune_layers`, :class:`~ecoflap.pruning.criteria.Criterion`.
"""
