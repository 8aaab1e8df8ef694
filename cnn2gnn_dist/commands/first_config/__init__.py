"""From images of one's own to a first config: where they lie, what they are, what this machine can do in time."""
