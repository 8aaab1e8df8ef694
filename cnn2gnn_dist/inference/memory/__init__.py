"""The memory of a model: the images that unseen ones attach to, in immutable versions on disk."""
