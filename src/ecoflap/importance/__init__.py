"""Stage 1: one global score a layer, one file a measure.

Knows ``allocation``, ``statistics`` and what lies below; nothing of pruning. Public:
:func:`~ecoflap.importance.measure.measure_importance`, :class:`~ecoflap.importance.scores.Importance`,
:func:`~ecoflap.importance.allocate.allocate`.
"""
