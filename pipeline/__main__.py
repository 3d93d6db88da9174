"""``python -m pipeline`` is ``depthpipe``."""

import sys

from pipeline.cli import main

sys.exit(main())
