"""Searches the allocation with the least measured loss (docs/search.md).

Imports ``pruning`` and the folders below. Public: :func:`~ecoflap.search.search.search_allocation`,
:class:`~ecoflap.search.method.Method`.
"""
