"""Methods × sparsities × seeds on one model: the grid, its table and its plots (``ecoflap compare``)."""
