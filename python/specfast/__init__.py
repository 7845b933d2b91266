"""specfast: speculative decoding with compiled kernels. Faster tokens, the same words.

>>> import specfast
>>> engine = specfast.load()                      # the embedded pair
>>> result = engine.generate("def main():", max_tokens=32, temperature=0)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import _core, ops
from .config import SpeculativeConfig
from .context import Chunk
from .engine import Engine
from .errors import (
    ConfigurationError,
    ContextFullError,
    DownloadError,
    IncompatibleDraftError,
    KernelTrialError,
    ModelFormatError,
    NumericalError,
    RingError,
    ShapeError,
    SpecfastError,
    UnsupportedModelError,
)
from .families import get_model_family_variants, suggest_speculative_config
from .generation import Generation, Result
from .inference import get_inference_engine, load

__all__ = [
    "Chunk",
    "ConfigurationError",
    "ContextFullError",
    "DownloadError",
    "Engine",
    "Generation",
    "IncompatibleDraftError",
    "KernelTrialError",
    "ModelFormatError",
    "NumericalError",
    "Result",
    "RingError",
    "ShapeError",
    "SpecfastError",
    "SpeculativeConfig",
    "UnsupportedModelError",
    "build_info",
    "get_inference_engine",
    "get_model_family_variants",
    "load",
    "ops",
    "suggest_speculative_config",
]


def build_info() -> dict[str, Any]:
    """Version, compiler, compiled and supported instruction sets, kernels by name, the selected ones, threads.

    Where SPECFAST_ISA names no usable instruction set, `isa` is None and `isa_problem` says why.
    """
    return dict(_core.build_info())


if TYPE_CHECKING:
    __version__: str
else:

    def __getattr__(name: str) -> str:
        """`__version__`, when asked for: it comes with the number of usable cores, which an import must not settle."""
        if name == "__version__":
            return str(_core.build_info()["version"])
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
