"""The stages of a run: each from files to files, the same call on every rank."""
