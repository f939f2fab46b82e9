"""A model as towers of blocks of layers: discovery, replay, loading and saving."""
