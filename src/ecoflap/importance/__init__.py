"""Stage 1: one global score for each layer, one file for each measure.

Imports ``allocation``, ``statistics`` and the folders below; nothing of pruning. Public:
:func:`~ecoflap.importance.measure.measure_importance`, :class:`~ecoflap.importance.scores.Importance`,
:func:`~ecoflap.importance.allocate.allocate`.
"""
