"""What a peer is, and which peers there are: each one engine, in one module, run in a process of its own."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt


class Peer(Protocol):
    """An engine with a model of random weights and a filled KV cache.

    `about` holds for the record: version, weights (in words), weight_bytes (what one pass streams).
    """

    about: dict[str, Any]

    def rows(self, M: int) -> float:
        """Seconds of one forward pass of M random tokens that computes the logits of all M rows.

        The cache holds the same context before and after; rolling it back is not timed.
        """
        ...


class PeerModule(Protocol):
    """What a peer's module defines. `prepare` makes the model files that are missing, and is run in a process before `start`."""

    def prepare(self, shape: str, cache: Path) -> None: ...
    def start(self, shape: str, context: int, threads: int, cache: Path) -> Peer: ...


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package it is in
        return False


@dataclass(frozen=True)
class Engine:
    """A peer before it is imported: `needs` are its modules, `packages` the pip names that bring them."""

    name: str
    module: str
    needs: tuple[str, ...]
    packages: str
    only: tuple[str, ...] = ()  # shapes it is measured at, all if empty
    rows: tuple[int, ...] = ()  # row counts it is measured at, all if empty
    why: str = ""  # of the two limits above

    def missing(self) -> str:
        """Why it cannot run here and what to do, or nothing."""
        absent = [name for name in self.needs if not _found(name)]
        if not absent:
            return ""
        return f"{self.name}: left out, Python finds no module {', '.join(absent)}; pip install {self.packages}"

    def load(self) -> PeerModule:
        """Imports the module; its packages must be there."""
        return cast(PeerModule, importlib.import_module(self.module))


ENGINES = {
    engine.name: engine
    for engine in (
        Engine("specfast", "peer_specfast", ("specfast",), "."),
        Engine("llama.cpp", "peer_llama_cpp", ("llama_cpp", "gguf"), "llama-cpp-python gguf"),
        Engine(
            "OpenVINO", "peer_openvino", ("openvino", "nncf", "torch"), "openvino nncf torch",
            only=("llama-3.2-1b",), why="making its model takes several times 4 bytes of memory for each parameter",
        ),
        Engine(
            "MLX", "peer_mlx", ("mlx.core", "mlx_lm"), "'mlx[cpu]' mlx-lm",
            only=("llama-3.2-1b",), rows=(1, 2, 4, 6, 8, 9), why="its CPU backend takes seconds for each row of that size",
        ),
    )
}  # fmt: skip


def random_tokens(random: np.random.Generator, count: int, vocab: int) -> npt.NDArray[np.int32]:
    """Token ids (count,) int32."""
    return random.integers(0, vocab, count).astype(np.int32)


def check_logits(logits: npt.NDArray[np.float32], M: int, vocab: int) -> None:
    """Raises ValueError unless these are finite logits (M, vocab) of rows that differ: the pass did what is timed."""
    if logits.shape != (M, vocab):
        raise ValueError(f"the logits have shape {logits.shape}, but {M} rows of {vocab} were asked for")
    if not np.isfinite(logits).all():
        raise ValueError("some logits are not finite")
    if any(np.array_equal(logits[0], logits[m]) for m in range(1, M)):
        raise ValueError("rows of different tokens have the same logits")
