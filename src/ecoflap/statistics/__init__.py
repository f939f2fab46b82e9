"""Statistics of the inputs that layers get: gathered block by block, real tokens only, once per distinct input."""
