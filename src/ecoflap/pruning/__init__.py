"""Stage 2: the walk through the blocks and the local criteria."""
