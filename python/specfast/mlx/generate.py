"""`python -m specfast.mlx.generate`: the command line. In code `specfast.mlx.generate` is the function of that name."""

from __future__ import annotations

import sys

from .command import main

if __name__ == "__main__":
    sys.exit(main())
