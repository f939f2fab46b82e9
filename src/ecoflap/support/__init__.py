"""What every folder uses and no method is in: registry, progress, safe files, processes that share work.

Imports ``errors`` alone. Public: :class:`~ecoflap.support.registry.Registry`,
:class:`~ecoflap.support.progress.Progress`, :class:`~ecoflap.support.workers.Workers`.
"""
