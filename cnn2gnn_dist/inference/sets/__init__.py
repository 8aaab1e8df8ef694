"""Images that belong together, answered together: two gates that decide whether they do, and the answer."""
