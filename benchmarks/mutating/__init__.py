"""Parts of ``benchmarks/mutants.py``: what is mutated, where it runs, what may survive."""
