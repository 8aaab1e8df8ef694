"""The parts of benchmarks/scale.py: measurements, competitors, plots."""
