"""``python -m bench.paper``: ``pathrnn paper`` from the source tree."""

import sys

from .command import main

sys.exit(main(sys.argv[1:]))
