"""Submit a run from a checkout: what ``python -m cnn2gnn_dist.submit`` is to an installed package."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cnn2gnn_dist.submit import main

if __name__ == "__main__":
    sys.exit(main())
