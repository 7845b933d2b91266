"""The Metal kernels: their source text, the host name of every instantiation, and the launch for a shape.

The kernels lie in metal/ at the root of the repository and beside this module in a wheel. Whatever runs them (MLX's
`mx.fast.metal_kernel`, an MLX primitive, TinyGrad, the tests' executor) takes source, name, grid and constants from here.

>>> launch = matmul_rows(Weights(4, 64), "bf16", M=5, N=4096, K=4096)
>>> launch.kernel.name, launch.grid, launch.threadgroup
('matmul_rows_q4g64_bf16_m5_store', (512, 1, 1), (64, 1, 1))
"""

from .generated import Generated, generated
from .launches import (
    HEAD_DIMS,
    MAX_ROWS,
    SPAN,
    Kernel,
    Launch,
    Weights,
    attend_rows,
    attend_spans,
    commit_round,
    compact_path,
    couple_pick,
    couple_rows,
    embed_rows,
    law_rows,
    law_scales,
    law_weights,
    logits_best,
    logits_rows,
    matmul_rows,
    norm_rows,
    qkv_rope_append,
    swiglu_rows,
    verify_greedy,
    verify_masses,
    verify_pick,
    verify_scan,
)
from .settings import VerifySettings
from .source import program, source

__all__ = [
    "HEAD_DIMS",
    "MAX_ROWS",
    "SPAN",
    "Generated",
    "Kernel",
    "Launch",
    "VerifySettings",
    "Weights",
    "attend_rows",
    "attend_spans",
    "commit_round",
    "compact_path",
    "couple_pick",
    "couple_rows",
    "embed_rows",
    "generated",
    "law_rows",
    "law_scales",
    "law_weights",
    "logits_best",
    "logits_rows",
    "matmul_rows",
    "norm_rows",
    "program",
    "qkv_rope_append",
    "source",
    "swiglu_rows",
    "verify_greedy",
    "verify_masses",
    "verify_pick",
    "verify_scan",
]
