"""Images that belong together, answered together: whether they do, and the answer."""
