"""The parts of benchmarks/scale.py: what is measured, against whom, and how it is drawn."""
