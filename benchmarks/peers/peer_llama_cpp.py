"""llama.cpp through llama-cpp-python: Q4_0, a batch that asks for the logits of every row, flash attention where it is faster."""

from __future__ import annotations

import ctypes
import time
from pathlib import Path

import llama_cpp
import numpy as np
import numpy.typing as npt
import random_gguf
from engines import check_logits, random_tokens
from specfast.bench.shapes import find_shape

SEQUENCE, BATCH = 0, 512
TRIED_ROWS, TRIES = (1, 4, 8), 5


@llama_cpp.llama_log_callback
def _log(level: int, text: bytes, _: ctypes.c_void_p) -> None:
    """Prints warnings and errors, which goes to the peer's log."""
    if level >= 3:
        print(text.decode(errors="replace"), end="", flush=True)


class Context:
    """A prefilled sequence over a model, with flash attention on or off."""

    def __init__(self, model: ctypes.c_void_p, vocab: int, positions: int, threads: int, *, flash: bool) -> None:
        self.vocab, self.positions = vocab, positions
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = positions + 32, BATCH, BATCH
        options.n_threads = options.n_threads_batch = threads
        options.flash_attn_type = (
            llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        self.handle = llama_cpp.llama_init_from_model(model, options)
        if not self.handle:
            raise ValueError(f"llama.cpp makes no context of {positions} positions")
        self.memory = llama_cpp.llama_get_memory(self.handle)
        self.batch = llama_cpp.llama_batch_init(BATCH, 0, 1)
        self.random = np.random.default_rng(1)
        for first in range(0, positions, BATCH):
            self._decode(first, min(BATCH, positions - first), logits=False)

    def _decode(self, first: int, count: int, *, logits: bool) -> float:
        """Appends random tokens; returns the seconds until the logits of all of them can be read."""
        batch = self.batch
        batch.n_tokens = count
        for i, token in enumerate(random_tokens(self.random, count, self.vocab)):
            batch.token[i], batch.pos[i] = int(token), first + i
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, SEQUENCE, logits
        start = time.perf_counter()
        status = llama_cpp.llama_decode(self.handle, batch)
        if logits:
            llama_cpp.llama_get_logits(self.handle)  # waits for the computation
        seconds = time.perf_counter() - start
        if status:
            raise ValueError(f"llama_decode returned {status} for {count} tokens at position {first}")
        return seconds

    def rows(self, M: int) -> float:
        seconds = self._decode(self.positions, M, logits=True)
        if not llama_cpp.llama_memory_seq_rm(self.memory, SEQUENCE, self.positions, -1):
            raise ValueError("llama.cpp did not remove the rows of the last pass")
        return seconds

    def last_logits(self, M: int) -> npt.NDArray[np.float32]:
        """A copy of the logits (M, V) float32 of the last pass, which had M rows."""
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits(self.handle), (M, self.vocab)).copy()


class LlamaCpp:
    """A model of a GGUF file and the context that is faster: on some CPUs flash attention is not."""

    def __init__(self, path: Path, shape: str, positions: int, threads: int) -> None:
        sizes = find_shape(shape)
        llama_cpp.llama_log_set(_log, None)
        llama_cpp.llama_backend_init()
        loading = llama_cpp.llama_model_default_params()
        loading.n_gpu_layers = 0
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), loading)
        if not model:
            raise ValueError(f"llama.cpp does not load {path}; delete it to have it made again")
        contexts = {flash: Context(model, sizes.vocab, positions, threads, flash=flash) for flash in (True, False)}
        for context in contexts.values():
            context.rows(2)
            check_logits(context.last_logits(2), 2, sizes.vocab)
        tries = [{flash: [c.rows(M) for M in TRIED_ROWS] for flash, c in contexts.items()} for _ in range(TRIES)]
        taken = {flash: float(np.min([t[flash] for t in tries], axis=0).sum()) for flash in contexts}
        flash = taken[True] < taken[False]
        llama_cpp.llama_free(contexts.pop(not flash).handle)
        self.context = contexts[flash]
        attention = f"flash attention {'on' if flash else 'off'} ({taken[flash] / taken[not flash]:.2f} of the time with it {'off' if flash else 'on'})"
        self.about = {
            "version": f"llama-cpp-python {llama_cpp.__version__}",
            "weights": f"Q4_0, {'embedding and output' if sizes.tied else 'output'} Q6_K, {attention}",
            "weight_bytes": random_gguf.streamed_bytes(sizes),
            "system": llama_cpp.llama_print_system_info().decode().strip(),
        }

    def rows(self, M: int) -> float:
        return self.context.rows(M)


def _path(shape: str, cache: Path) -> Path:
    return cache / f"{shape}-q4_0.gguf"


def prepare(shape: str, cache: Path) -> None:
    """Writes the GGUF file."""
    if not _path(shape, cache).is_file():
        random_gguf.write(_path(shape, cache), find_shape(shape))


def start(shape: str, context: int, threads: int, cache: Path) -> LlamaCpp:
    return LlamaCpp(_path(shape, cache), shape, context, threads)
