"""Measured numbers from which a run's plan is computed, each with the command that measures it.

Machine: 2 cores of an AMD EPYC (Zen 3, AVX2), 23 GiB, no GPU. For another machine, measure there and
pass what differs to ``plan``: --gflops, --gbit.
"""

from __future__ import annotations

PROCESS = 470 * 10**6
"""Bytes of a rank's process on the CPU besides its model: Python, torch, DeepSpeed, after the first steps.
``python benchmarks/sizing.py`` (column "process")."""

LATENCY_S = 5e-5
"""Seconds per message of a collective. Assumed, not measured: hosts in one data center."""

CPU_GFLOPS = {"float32": 53.0, "bfloat16": 175.0}
"""GFLOP/s of a core in a training step of the teacher. float32: ``python benchmarks/sizing.py`` (column "GFLOP/s")
on a core with AVX2. bfloat16: ``python benchmarks/training.py`` on one with AVX512-bf16, which does 107 in float32."""

STUDENT_SHARE = 0.66
"""Share of the teacher's rate that the student reaches, being memory-bound. The same table: 35 of 53."""

OWN_STEP_S = 0.012
"""Seconds per step outside the models: the engine, its checks and collectives (``init``'s ``_STEP_S``)."""

BACKWARD = 2.0
"""Operations of a backward pass per operation of its forward pass: gradients of inputs and of weights."""

DECODE_S = {"photograph": 1.12e-3, "small": 2.4e-5}
"""Seconds that a core takes for a photograph's random crop at 224 pixels, and for an image of 32 pixels.
``python benchmarks/stream.py``."""

SMALL = 64
"""Pixels up to which images count as small."""

HALF = 0.5
"""Bytes of activations in bfloat16 per byte in float32, from the types; not measured, for want of a GPU."""
