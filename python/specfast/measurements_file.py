"""The small file that keeps a pair's measurements, so that the next start knows them at once.

It lies in $XDG_CACHE_HOME/specfast/measurements (or ~/.cache/...), under a name made of both models' contents, precision,
instruction set, threads and version. It is replaced in one step; one that cannot be read is as good as none.
SPECFAST_MEASUREMENTS=0 keeps everything in memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path

from . import _core
from .checkpoint import LoadedModel
from .gguf_file import is_gguf
from .measurements import Measurements

SWITCH = "SPECFAST_MEASUREMENTS"
_SAMPLE_BYTES = 1 << 16


def measurements_path(
    target: LoadedModel, draft: LoadedModel | None, early_exit: int | str | None = None
) -> Path | None:
    """Where the measurements of a pair, or of a target and its exit, are kept with the present threads; None if they are not."""
    if os.environ.get(SWITCH) == "0":
        return None
    info = _core.build_info()
    parts = [str(info["version"]), str(_core.num_threads()), str(early_exit)]
    for model in (target, draft):
        parts += [_fingerprint(model.directory), model.precision, model.model.isa] if model else ["none"]
    name = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]
    home = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(home) / "specfast" / "measurements" / f"{name}.json"


def _fingerprint(model: Path) -> str:
    """Tells models apart by their configuration, and the size and both ends of their weights."""
    digest = hashlib.sha256()
    for path in [model] if is_gguf(model) else [model / "config.json", *sorted(model.glob("*.safetensors"))]:
        with path.open("rb") as file:
            size = path.stat().st_size
            digest.update(f"{path.name} {size}".encode())
            digest.update(file.read(_SAMPLE_BYTES))
            file.seek(max(0, size - _SAMPLE_BYTES))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def load_measurements(path: Path | None) -> Measurements:
    """What a file holds; nothing yet where there is none, or none that can be read."""
    try:
        return Measurements.from_dict(json.loads(path.read_bytes())) if path else Measurements()
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return Measurements()


def save_measurements(path: Path | None, measurements: Measurements) -> None:
    """Replaces the file; does nothing where that is not possible."""
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump(measurements.as_dict(), file)
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except (OSError, RuntimeError):  # another thread may be adding to them
        return
