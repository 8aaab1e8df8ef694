"""Answers about images: ``predict``, of files or of whole shards, ``embed``, and the files they write."""
