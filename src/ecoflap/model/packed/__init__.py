"""Sparse weights that are stored, loaded and multiplied packed."""
