"""specfast inside tinygrad: models whose forward pass is one native call in tinygrad's graph.

>>> from specfast.tinygrad import accelerate, load_gguf
>>> model = accelerate(load_gguf("Llama-3.2-1B-Instruct-Q4_0.gguf"))    # model.generate as before, on specfast's kernels
"""

from __future__ import annotations

try:
    import tinygrad  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"specfast.tinygrad needs tinygrad ({error}); install it with: pip install 'specfast[tinygrad]'"
    ) from error

from . import private

private.require_supported()
private.require_device()
private.graph_problem()

from .accelerate import Report, accelerate, cached_keys_values, logits, report, restore  # noqa: E402
from .generate import generate, load_gguf, stream_generate  # noqa: E402
from .private import UnsupportedHostError  # noqa: E402

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
