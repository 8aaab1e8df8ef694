"""The contenders of benchmarks/steps.py."""
