"""``cnn2gnn init``, from images of one's own to a first config: where they lie, what they are, how fast it goes."""
