"""A run's artefacts in an object store: kept there as soon as they are complete, fetched when they are needed."""
