"""OpenVINO on the CPU: INT4 weights in groups of 128, latency hint, its default precision, a stateful KV cache."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import openvino as ov
from engines import check_logits, random_tokens
from specfast.bench.shapes import find_shape


class OpenVino:
    """A compiled model and a request whose state holds the context."""

    def __init__(self, path: Path, shape: str, context: int, threads: int) -> None:
        sizes = find_shape(shape)
        self.vocab, self.context, self.random = sizes.vocab, context, np.random.default_rng(1)
        settings = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": threads}
        compiled = ov.Core().compile_model(path, "CPU", settings)
        self.request = compiled.create_infer_request()
        self._infer(0, context)
        # The state has no trimming: rolling back is writing the context's keys and values again.
        self.states = self.request.query_state()
        self.filled = [ov.Tensor(np.array(state.state.data)) for state in self.states]
        self._roll_back()
        check_logits(self._infer(context, 2)[1][0], 2, self.vocab)
        precision, kv = (
            compiled.get_property(name).to_string() for name in ("INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION")
        )
        self.about = {
            "version": f"openvino {ov.__version__.partition('-')[0]}",
            "weights": f"INT4_SYM group 128, embedding and output int8, {precision} hint, {kv} KV cache",
            "weight_bytes": path.with_suffix(".bin").stat().st_size
            - sizes.vocab * sizes.hidden,  # the embedding is int8
        }

    def _roll_back(self) -> None:
        for state, tensor in zip(self.states, self.filled, strict=True):
            state.state = tensor

    def _infer(self, past: int, M: int) -> tuple[float, npt.NDArray[np.float32]]:
        """Appends M random tokens: seconds, and logits (1, M, V) float32."""
        inputs = {
            "tokens": random_tokens(self.random, M, self.vocab)[None].astype(np.int64),
            "positions": np.arange(past, past + M, dtype=np.int64)[None],
            "mask": np.triu(np.full((M, past + M), -3e38, np.float32), past + 1)[None, None],
            "beam_idx": np.zeros(1, np.int32),
        }
        start = time.perf_counter()
        result = self.request.infer(inputs, share_inputs=True, share_outputs=True)
        return time.perf_counter() - start, result[0]

    def rows(self, M: int) -> float:
        self._roll_back()
        return self._infer(self.context, M)[0]


def _path(shape: str, cache: Path) -> Path:
    return cache / f"{shape}-int4.xml"


def prepare(shape: str, cache: Path) -> None:
    """Converts and compresses the model."""
    import random_openvino  # noqa: PLC0415 - torch and nncf are needed only here

    if not _path(shape, cache).is_file():
        random_openvino.write(_path(shape, cache), find_shape(shape))


def start(shape: str, context: int, threads: int, cache: Path) -> OpenVino:
    return OpenVino(_path(shape, cache), shape, context, threads)
