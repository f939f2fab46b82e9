"""Stage 1: one global score for each layer. One file for each measure.

Imports ``allocation``, ``statistics`` and what stands below; nothing of pruning. Public:
:func:`~ecoflap.importance.measure.measure_importance`, :class:`~ecoflap.importance.scores.Importance`,
:func:`~ecoflap.importance.allocate.allocate`.
"""
