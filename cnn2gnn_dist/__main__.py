"""``python -m cnn2gnn_dist`` is ``cnn2gnn``."""

import sys

from cnn2gnn_dist.cli import main

sys.exit(main())
