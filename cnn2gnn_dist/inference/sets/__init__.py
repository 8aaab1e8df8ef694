"""Images that belong together, answered together: two gates that decide whether they are, and the answer."""
