"""What the tests share: small inputs, real servers, groups of ranks, small whole runs."""

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
