"""The parts of benchmarks/memory.py: features, rivals, sets of images, shifted images."""
