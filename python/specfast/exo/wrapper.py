"""`specfast-exo ARGS`: exo with speculative decoding, for where the start-up hook is not wanted."""

from __future__ import annotations

import importlib
import sys

from .detection import find_exo


def main() -> int:
    """Runs exo's own command line with everything the start-up hook adds."""
    found = find_exo()
    if found.kind != "first generation":
        print(
            f"specfast-exo: needs exo's first generation (the one with --inference-engine); found: {found.explain()}",
            file=sys.stderr,
        )
        return 2
    importlib.import_module("_specfast_exo_hook").install()
    importlib.import_module("exo.main").run()
    return 0
