"""The candidate table: exact and approximate nearest neighbors, in work units shared by ranks."""
