"""Search for the allocation that costs a given model least, by its own measured loss. See docs/search.md."""
