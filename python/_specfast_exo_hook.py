"""Start-up hook of specfast: `exo --inference-engine speculative` works where exo's first generation is installed.

The interpreter imports this file at start (specfast_exo.pth), so it is small, uses the standard library only and never
raises. It waits for the import of exo's own modules, and hands them to specfast.exo; in every other process it does
nothing. SPECFAST_EXO_HOOK=0 switches it off, and uninstalling specfast removes it.
"""

import os
import sys

MODULES = frozenset(
    {
        "exo.inference.inference_engine",
        "exo.orchestration.node",
        "exo.networking.grpc.grpc_peer_handle",
        "exo.api.chatgpt_api",
        "exo.main",
    }
)


class ExoFinder:
    """A meta path finder that knows exo's modules only, and finds them where everybody else does."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        """The module's own spec, whose loader also calls specfast.exo; None for all other modules."""
        if name not in MODULES or not _first_generation():
            return None
        for finder in list(sys.meta_path):
            find_spec = None if finder is ExoFinder else getattr(finder, "find_spec", None)
            spec = find_spec(name, path, target) if find_spec else None
            if spec is not None:
                _extend(spec)
                return spec
        return None


def _first_generation():
    """Whether the imported `exo` is the program's first generation, by its files; other programs have this name too."""
    for folder in getattr(sys.modules.get("exo"), "__path__", ()):
        if all(os.path.isfile(os.path.join(folder, *parts)) for parts in (("inference", "inference_engine.py"), ("orchestration", "node.py"))):  # fmt: skip
            return True
    return False


def _extend(spec):
    execute = getattr(spec.loader, "exec_module", None)
    if execute is None:
        return

    def exec_module(module):
        _tell("before", module.__name__)
        execute(module)
        _tell("after", module)

    spec.loader.exec_module = exec_module


def _tell(what, about):
    """Calls specfast.exo.hooks; whatever goes wrong there must not keep exo from starting."""
    try:
        from specfast.exo import hooks

        getattr(hooks, what)(about)
    except Exception as error:
        print(f"specfast: speculative decoding is not available in exo ({type(error).__name__}: {error})", file=sys.stderr)  # fmt: skip


def install():
    """Puts the finder first, once."""
    if ExoFinder not in sys.meta_path:
        sys.meta_path.insert(0, ExoFinder)
