"""Statistics of the inputs that layers get: gathered block by block, real tokens only, once per distinct input.

Knows ``data``, ``model`` and what lies below. Public: :class:`~ecoflap.statistics.choice.TokenChoice`,
:class:`~ecoflap.statistics.inputs.InputStatistics`.
"""
