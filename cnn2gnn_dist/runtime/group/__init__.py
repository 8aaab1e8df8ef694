"""A group of ranks: who is in it, where they meet, what they exchange, and how a lost one is noticed."""
