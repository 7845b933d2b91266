"""Which exo is installed: several programs and two generations carry the name."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Kind = Literal["first generation", "second generation", "another program", "none"]
KILL_SWITCH = "SPECFAST_EXO_HOOK"
SWITCH = "SPECFAST_EXO"
APPS = (Path("/Applications/EXO.app"), Path("~/Applications/EXO.app"))

_FILES: tuple[tuple[Kind, tuple[str, ...]], ...] = (
    ("first generation", ("inference/inference_engine.py", "orchestration/node.py", "main.py")),
    ("second generation", ("worker/engines/base.py",)),
)
_SECOND = (
    f"{SWITCH}=1 or a --speculative-* flag speculates on models of a single node; models spread over several nodes are not "
    "supported and decoded plainly by exo"
)


@dataclass(frozen=True)
class FoundExo:
    """What `import exo` would give.

    Attributes:
        kind: "first generation" has `--inference-engine`; "second generation" is the rewrite; "another program" only
            shares the name.
        path: the package's folder.
        version: of the distribution, if it says.
        hooked: whether the start-up hook is active in this interpreter.
    """

    kind: Kind
    path: Path | None
    version: str | None
    hooked: bool

    @property
    def usable(self) -> bool:
        """Whether `exo --inference-engine speculative` works."""
        return self.kind in ("first generation", "second generation") and self.hooked

    def explain(self) -> str:
        """What specfast does about it, and what to do."""
        if self.kind == "none":
            return "not installed"
        if self.kind == "another program":
            return f"another program of this name, at {self.path}: left alone"
        first = self.kind == "first generation"
        what = "`exo --inference-engine speculative` works, on rings too" if first else _SECOND
        if self.hooked:
            return f"{self.kind}: {what} (start-up hook)"
        if os.environ.get(KILL_SWITCH) == "0":
            return f"{self.kind}, and the start-up hook is switched off ({KILL_SWITCH}=0): use `specfast-exo`"
        return f"{self.kind}, but the start-up hook is not installed here: use `specfast-exo`, or install a wheel"


def packaged_apps() -> list[Path]:
    """exo as an application: it has a Python of its own, into which nothing can be installed."""
    return [path for app in APPS if (path := app.expanduser()).exists()]


def find_exo() -> FoundExo:
    """Looks without importing anything of it."""
    try:
        spec = importlib.util.find_spec("exo")
    except (ImportError, ValueError):
        spec = None
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    if spec is None or (spec.origin is None and not any(_kind(folder) for folder in folders)):
        return FoundExo("none", None, None, False)  # a folder that happens to be called exo is no package
    hook = sys.modules.get("_specfast_exo_hook")
    hooked = hook is not None and hook.ExoFinder in sys.meta_path
    for folder in folders:
        if kind := _kind(folder):
            return FoundExo(kind, folder, _version(), hooked)
    origin = Path(spec.origin) if spec.origin else None
    return FoundExo("another program", folders[0] if folders else origin, _version(), False)


def _kind(folder: Path) -> Kind | None:
    return next((kind for kind, files in _FILES if all((folder / file).is_file() for file in files)), None)


def _version() -> str | None:
    try:
        return importlib.metadata.version("exo")
    except importlib.metadata.PackageNotFoundError:
        return None
