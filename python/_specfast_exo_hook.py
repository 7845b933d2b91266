"""Start-up hook of specfast: engine `speculative` in exo's first generation, speculation on demand in the second.

The interpreter imports this file at start (specfast_exo.pth), so it is small, uses the standard library only and never
raises. It waits for the import of exo's own modules, and hands them to specfast.exo; in every other process it does
nothing. SPECFAST_EXO_HOOK=0 switches it off, and uninstalling specfast removes it.
"""

import os
import sys

FIRST = frozenset(
    {
        "exo.inference.inference_engine",
        "exo.orchestration.node",
        "exo.networking.grpc.grpc_peer_handle",
        "exo.api.chatgpt_api",
        "exo.main",
    }
)


SECOND = frozenset({"exo.main", "exo.worker.engines.mlx.builder"})


class ExoFinder:
    """A meta path finder that knows exo's modules only, and finds them where everybody else does."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        """The module's own spec, whose loader also calls specfast.exo; None for all other modules."""
        if not (name in FIRST or name in SECOND):
            return None
        hooks = _hooks(name)
        if hooks is None:
            return None
        for finder in list(sys.meta_path):
            find_spec = None if finder is ExoFinder else getattr(finder, "find_spec", None)
            spec = find_spec(name, path, target) if find_spec else None
            if spec is not None:
                _extend(spec, hooks)
                return spec
        return None


def _hooks(name):
    """Who extends a module of the imported `exo`, by its files: other programs have this name too. The second generation is
    extended on demand only."""
    for folder in getattr(sys.modules.get("exo"), "__path__", ()):
        if all(os.path.isfile(os.path.join(folder, *parts)) for parts in (("inference", "inference_engine.py"), ("orchestration", "node.py"))):  # fmt: skip
            return "hooks" if name in FIRST else None
        if name in SECOND and os.path.isfile(os.path.join(folder, "worker", "engines", "base.py")):
            typed = name == "exo.main" and any(a.startswith(("--speculative", "--inference-engine", "--disable-speculative", "run")) for a in sys.argv[1:])  # fmt: skip
            return "v1_hooks" if typed or os.environ.get("SPECFAST_EXO") == "1" else None
    return None


def _extend(spec, hooks):
    execute = getattr(spec.loader, "exec_module", None)
    if execute is None:
        return

    def exec_module(module):
        _tell(hooks, "before", module.__name__)
        execute(module)
        _tell(hooks, "after", module)

    spec.loader.exec_module = exec_module


def _tell(hooks, what, about):
    """Calls specfast.exo; whatever goes wrong there must not keep exo from starting."""
    try:
        import importlib

        getattr(importlib.import_module("specfast.exo." + hooks), what)(about)
    except Exception as error:
        print(f"specfast: speculative decoding is not available in exo ({type(error).__name__}: {error})", file=sys.stderr)  # fmt: skip


def install():
    """Puts the finder first, once."""
    if ExoFinder not in sys.meta_path:
        sys.meta_path.insert(0, ExoFinder)
