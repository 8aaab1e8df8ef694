"""Parts of ``benchmarks/mutants.py``: what is changed, where it runs, what may survive."""
