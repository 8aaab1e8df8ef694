"""Start a run as one rank from a checkout: what ``python -m cnn2gnn_dist.launcher`` is to an installed package."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cnn2gnn_dist.launcher import exit_now, main

if __name__ == "__main__":
    exit_now(main())
