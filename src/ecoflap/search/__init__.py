"""Searches the allocation that costs a given model least, by its own measured loss (docs/search.md).

Knows ``pruning`` and what lies below. Public: :func:`~ecoflap.search.search.search_allocation`,
:class:`~ecoflap.search.method.Method`.
"""
