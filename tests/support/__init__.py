"""Shared test support: small inputs, real servers, groups of ranks, small complete runs."""

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
