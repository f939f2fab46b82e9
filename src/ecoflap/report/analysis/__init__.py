"""Analyses of a run: computed from its directory, kept as JSON with images (``ecoflap analyse``)."""
