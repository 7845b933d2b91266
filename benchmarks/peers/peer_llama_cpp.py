"""llama.cpp through llama-cpp-python: Q4_0, flash attention, a batch that asks for the logits of every row."""

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


@llama_cpp.llama_log_callback
def _log(level: int, text: bytes, _: ctypes.c_void_p) -> None:
    """Keeps what is worth reading when the model does not load; nothing of it is printed otherwise."""
    if level >= 3:
        print(text.decode(errors="replace"), end="", flush=True)


class LlamaCpp:
    """A model of a GGUF file and a context with a prefilled sequence."""

    def __init__(self, path: Path, shape: str, context: int, threads: int) -> None:
        sizes = find_shape(shape)
        self.vocab, self.context = sizes.vocab, context
        llama_cpp.llama_log_set(_log, None)
        llama_cpp.llama_backend_init()
        loading = llama_cpp.llama_model_default_params()
        loading.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), loading)
        if not self.model:
            raise ValueError(f"llama.cpp does not load {path}; delete it to have it made again")
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = context + 32, BATCH, BATCH
        options.n_threads = options.n_threads_batch = threads
        options.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self.handle = llama_cpp.llama_init_from_model(self.model, options)
        if not self.handle:
            raise ValueError(f"llama.cpp makes no context of {context} positions")
        self.memory = llama_cpp.llama_get_memory(self.handle)
        self.batch = llama_cpp.llama_batch_init(BATCH, 0, 1)
        self.random = np.random.default_rng(1)
        for first in range(0, context, BATCH):
            self._decode(first, min(BATCH, context - first), logits=False)
        check_logits(self._logits(2), 2, self.vocab)
        self.about = {
            "version": f"llama-cpp-python {llama_cpp.__version__}",
            "weights": f"Q4_0, {'embedding and output' if sizes.tied else 'output'} Q6_K, flash attention",
            "weight_bytes": random_gguf.streamed_bytes(sizes),
            "system": llama_cpp.llama_print_system_info().decode().strip(),
        }

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

    def _logits(self, M: int) -> npt.NDArray[np.float32]:
        self._decode(self.context, M, logits=True)
        pointer = llama_cpp.llama_get_logits(self.handle)
        values = np.ctypeslib.as_array(pointer, (M, self.vocab)).copy()
        self._forget()
        return values

    def _forget(self) -> None:
        if not llama_cpp.llama_memory_seq_rm(self.memory, SEQUENCE, self.context, -1):
            raise ValueError("llama.cpp did not remove the rows of the last pass")

    def rows(self, M: int) -> float:
        seconds = self._decode(self.context, M, logits=True)
        self._forget()
        return seconds


def _path(shape: str, cache: Path) -> Path:
    return cache / f"{shape}-q4_0.gguf"


def prepare(shape: str, cache: Path) -> None:
    """Writes the GGUF file."""
    if not _path(shape, cache).is_file():
        random_gguf.write(_path(shape, cache), find_shape(shape))


def start(shape: str, context: int, threads: int, cache: Path) -> LlamaCpp:
    return LlamaCpp(_path(shape, cache), shape, context, threads)
