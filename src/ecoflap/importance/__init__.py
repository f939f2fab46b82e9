"""Stage 1: one global score a layer."""
