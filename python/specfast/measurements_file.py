"""The small file that keeps a pair's measurements, so that the next start knows them at once.

It lies in $XDG_CACHE_HOME/specfast/measurements (or ~/.cache/...), under a name made of both models' contents, precision,
instruction set, threads and version. It is replaced in one step; one that cannot be read is as good as none, and where a
model's files are gone there is none.
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
from .measurements import Measurements

SWITCH = "SPECFAST_MEASUREMENTS"


def measurements_path(
    target: LoadedModel, draft: LoadedModel | None, early_exit: int | str | None = None
) -> Path | None:
    """Where the measurements of a pair, or of a target and its exit, are kept with the present threads; None if they are not."""
    if os.environ.get(SWITCH) == "0":
        return None
    parts = [str(_core.build_info()["version"]), str(_core.num_threads()), str(early_exit)]
    for model in (target, draft):
        fingerprint = model.fingerprint if model else ""
        if fingerprint is None:
            return None
        parts += [fingerprint, model.precision, model.model.isa] if model else ["none"]
    name = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]
    home = Path(os.environ.get("XDG_CACHE_HOME", ""))
    home = home if home.is_absolute() else Path("~/.cache").expanduser()  # as the XDG specification has it
    return home / "specfast" / "measurements" / f"{name}.json"


def load_measurements(path: Path | None) -> Measurements:
    """What a file holds; nothing yet where there is none, or none that can be read."""
    try:
        if path is None or not path.is_file():
            return Measurements()
        return Measurements.from_dict(json.loads(path.read_bytes()))
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
