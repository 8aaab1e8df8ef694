"""The stages of a run: each from files to files, called identically on every rank."""
