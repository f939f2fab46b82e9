"""ECoFLaP: coarse-to-fine layer-wise pruning of vision-language models."""
