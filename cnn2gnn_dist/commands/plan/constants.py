"""Measured numbers that the plan of a run is computed with, each with the command that measures it.

Machine: 2 cores of an AMD EPYC (Zen 3, AVX2), 23 GiB, no GPU. Whoever has another machine measures there and
gives ``plan`` what differs: --gflops, --gbit.
"""

from __future__ import annotations

PROCESS = 470 * 10**6
"""Bytes of a rank's process on the CPU beside its model: Python, torch, DeepSpeed, after the first steps.
``python benchmarks/sizing.py`` (column "process")."""

LATENCY_S = 5e-5
"""Seconds of one message of a collective. Assumed: hosts of one data center; not measured here."""

CPU_GFLOPS = {"float32": 53.0, "bfloat16": 175.0}
"""GFLOP/s of a core in a training step of the teacher. float32: ``python benchmarks/sizing.py`` (column "GFLOP/s")
on a core with AVX2. bfloat16: ``python benchmarks/training.py`` on one with AVX512-bf16, which does 107 in float32."""

STUDENT_SHARE = 0.66
"""Of the teacher's rate that the student reaches: a small network waits for memory. The same table: 35 of 53."""

OWN_STEP_S = 0.012
"""Seconds of a step that no model takes: the engine, its checks and collectives (``init``'s ``_STEP_S``)."""

BACKWARD = 2.0
"""A backward pass computes so many times its forward pass: gradients of inputs and of weights."""

DECODE_S = {"photograph": 1.12e-3, "small": 2.4e-5}
"""Seconds of a core for a photograph's random crop at 224 pixels, and for an image of 32 pixels.
``python benchmarks/stream.py``."""

SMALL = 64
"""Pixels up to which images count as small."""

HALF = 0.5
"""Activations under bfloat16 beside those traced in float32. By their type; not measured, as no GPU was at hand."""
