"""Makes the embedded VLM: its data, its training and its scores. Not part of the package."""
