"""``python -m exo_toy.cli``: the command where it is not on the path."""

import sys

from exo_toy.cli import main

sys.exit(main())
