"""Samples to batches to a loss."""
