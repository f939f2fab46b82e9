"""Analyses of a run: computed from its directory, kept as JSON beside pictures of them (``ecoflap analyse``)."""
