"""Trains a sparse model further with its zeros kept (``ecoflap finetune``): recipe, folder, data, training, record."""
