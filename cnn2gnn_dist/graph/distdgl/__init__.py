"""The graph and its bank held by DGL's servers instead of by the ranks."""
