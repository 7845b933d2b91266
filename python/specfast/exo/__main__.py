"""`python -m specfast.exo ARGS` is `specfast-exo ARGS`."""

import sys

from .wrapper import main

sys.exit(main())
