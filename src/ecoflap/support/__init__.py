"""Helpers that every folder uses: registry, progress, safe files, processes that share work.

Imports only ``errors``. Public: :class:`~ecoflap.support.registry.Registry`,
:class:`~ecoflap.support.progress.Progress`, :class:`~ecoflap.support.workers.Workers`.
"""
