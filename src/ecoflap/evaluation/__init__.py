"""What a model is worth, before and after: one file a task."""
