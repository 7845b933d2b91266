"""`python -m specfast` is the `specfast` command."""

import sys

from .cli import main

sys.exit(main())
