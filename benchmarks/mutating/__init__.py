"""Parts of ``benchmarks/mutants.py``: what is mutated, where it runs, and what may survive."""
