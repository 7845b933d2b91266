"""specfast inside MLX: mlx-lm models whose forward pass is one native call on the arrays' own memory.

>>> import mlx_lm, specfast.mlx
>>> model, tokenizer = mlx_lm.load("mlx-community/Llama-3.2-1B-Instruct-4bit")
>>> specfast.mlx.accelerate(model)
>>> mlx_lm.generate(model, tokenizer, "Hello")    # as before, on specfast's kernels
"""

from __future__ import annotations

try:
    import mlx.core  # noqa: F401
    import mlx_lm  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"specfast.mlx needs mlx and mlx-lm ({error}); install them with: pip install 'specfast[mlx]'"
    ) from error

from .accelerate import Report, accelerate, report, restore
from .cache import KVCache, QuantizedKVCache, RotatingKVCache
from .difference import Difference, compare
from .stream import GenerationResponse, Stream, generate, generate_step, stream_generate

__all__ = [
    "Difference",
    "GenerationResponse",
    "KVCache",
    "QuantizedKVCache",
    "Report",
    "RotatingKVCache",
    "Stream",
    "accelerate",
    "compare",
    "generate",
    "generate_step",
    "report",
    "restore",
    "stream_generate",
]
