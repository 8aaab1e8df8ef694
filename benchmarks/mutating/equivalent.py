"""Mutants that no test can or should notice, each with the reason.

Keyed by (subject, name as ``mutants.py`` prints it).
"""

from __future__ import annotations

REASONS: dict[tuple[str, str], str] = {}
