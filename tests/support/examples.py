"""How many examples a property test draws: fewer of the expensive ones under ``make quick``."""

import os

QUICK = os.environ.get("CNN2GNN_QUICK") == "1"


def examples(count: int) -> int:
    """``count``, or a fifth of it under ``make quick``."""
    return max(count // 5, 1) if QUICK else count
