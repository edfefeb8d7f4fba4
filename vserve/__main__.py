"""``python -m vserve`` is the command ``vserve``."""

import sys

from vserve.cli import main

sys.exit(main())
