"""A model's folder: what is in it, its card, and the Hub's repositories, which are such folders."""
