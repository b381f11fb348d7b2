"""``python -m pathrnn_kernels`` is the ``pathrnn`` command."""

import sys

from .cli import main

sys.exit(main())
