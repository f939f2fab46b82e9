"""The embedded vision-language model and its bundled data."""
