"""`specfast-exo ARGS`: exo with speculative decoding, for where the start-up hook is not wanted or not there.

To import it installs the hook: the processes that exo's second generation spawns import the script they come from, and need
the hook as well.
"""

from __future__ import annotations

import importlib
import sys

from .detection import find_exo

importlib.import_module("_specfast_exo_hook").install()
ENTRIES = {"first generation": "run", "second generation": "main"}


def main() -> int:
    """Runs exo's own command line with everything the start-up hook adds."""
    found = find_exo()
    if found.kind not in ENTRIES:
        print(f"specfast-exo: needs exo; found: {found.explain()}", file=sys.stderr)
        return 2
    getattr(importlib.import_module("exo.main"), ENTRIES[found.kind])()
    return 0
