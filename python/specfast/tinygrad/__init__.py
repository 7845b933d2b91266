"""specfast inside tinygrad: models whose forward pass is one native call in tinygrad's graph.

>>> from specfast.tinygrad import accelerate, load_gguf
>>> model = accelerate(load_gguf("Llama-3.2-1B-Instruct-Q4_0.gguf"))    # model.generate as before, on specfast's kernels
"""

from __future__ import annotations

import sys


def require_host() -> None:
    """Raises ImportError, an UnsupportedHostError where there is a tinygrad, if none can be used; says what would do."""
    try:
        import tinygrad  # noqa: F401, PLC0415
    except ImportError as error:
        raise ImportError(
            f"specfast.tinygrad needs tinygrad ({error}); install it with: pip install 'specfast[tinygrad]'"
        ) from error
    from . import private  # noqa: PLC0415 - needs tinygrad

    private.require_supported()
    private.require_device()
    private.graph_problem()


# python -m imports this before its own command, which tells errors in one line.
if sys.argv[:1] != ["-m"] or "specfast.tinygrad" not in sys.orig_argv:
    require_host()
    from .accelerate import Report, accelerate, cached_keys_values, logits, report, restore
    from .generate import generate, load_gguf, stream_generate
    from .private import UnsupportedHostError

__all__ = [
    "Report",
    "UnsupportedHostError",
    "accelerate",
    "cached_keys_values",
    "generate",
    "load_gguf",
    "logits",
    "report",
    "restore",
    "stream_generate",
]
