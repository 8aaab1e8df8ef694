"""Header-only reading of tar archives, and grouping of their members into samples."""
