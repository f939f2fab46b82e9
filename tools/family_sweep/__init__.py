"""Tries every family of models that transformers knows: what can be pruned, at full size and at pico size."""
