"""A finished model: open, export, edit its memory, serve."""
