"""What PyPI does not have of what exo's second generation imports: its Rust extension, and what its fork of mlx-lm has more.

Python runs this at its start where PYTHONPATH names the folder, in every process of exo's. What is installed comes first.
"""

import asyncio
import importlib
import importlib.abc
import importlib.machinery
import sys


def fill_exo_rs(module):
    """A node that finds no others: nothing arrives, and nobody listens."""

    class Connection:
        __match_args__ = ("connected",)

    class Message:
        __match_args__ = ("topic", "data")

    class NetworkingHandle:
        @staticmethod
        def new(*_arguments):
            return NetworkingHandle()

        async def recv(self):
            await asyncio.Event().wait()

        async def gossipsub_subscribe(self, _topic):
            return True

        async def gossipsub_unsubscribe(self, _topic):
            return True

        async def gossipsub_publish(self, _topic, _data):
            pass

    class Pidfile:
        def __init__(self, _path, _mode):
            pass

        def write(self):
            pass

        def as_raw_fd(self):
            return 0

        def close(self):
            pass

    module.FromSwarm = type("FromSwarm", (), {"Connection": Connection, "Message": Message})
    module.NetworkingHandle, module.Pidfile = NetworkingHandle, Pidfile
    module.PidfileError = type("PidfileError", (Exception,), {})


def fill_deepseek_v4(module):
    """Classes that no model here is of; and batches whose log probabilities are one array, which the fork can join."""
    mx, nn = (importlib.import_module(name) for name in ("mlx.core", "mlx.nn"))
    batch = importlib.import_module("mlx_lm.generate").GenerationBatch
    made, extend = {}, batch.extend

    def make(name):
        if name.startswith("__"):
            raise AttributeError(name)
        return made.setdefault(name, type(name, (nn.Module,), {}))

    def with_lists(self, other):
        for each in (self, other):
            for name in ("_current_logprobs", "_next_logprobs"):
                if isinstance(value := getattr(each, name), mx.array):
                    setattr(each, name, list(value))
        return extend(self, other)

    module.__getattr__, batch.extend = make, with_lists


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """The last to be asked for a module."""

    fillers = {"exo_rs": fill_exo_rs, "mlx_lm.models.deepseek_v4": fill_deepseek_v4}  # noqa: RUF012

    def find_spec(self, name, _path=None, _target=None):
        return importlib.machinery.ModuleSpec(name, self) if name in self.fillers else None

    def create_module(self, _spec):
        return None

    def exec_module(self, module):
        self.fillers[module.__name__](module)


sys.meta_path.append(Finder())
