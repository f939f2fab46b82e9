"""Statistics of layer inputs: gathered block by block, real tokens only, once for each distinct input.

Imports ``data``, ``model`` and the folders below. Public: :class:`~ecoflap.statistics.choice.TokenChoice`,
:class:`~ecoflap.statistics.inputs.InputStatistics`.
"""
