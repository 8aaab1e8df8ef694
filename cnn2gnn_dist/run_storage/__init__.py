"""A run's artefacts in an object store: stored as soon as they are complete, fetched when they are needed."""
