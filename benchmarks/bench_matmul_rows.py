"""matmul_rows on cold 4-bit, 8-bit and bf16 weights: T(M), GB/s, GMAC/s."""

import pytest
from specfast import _core

N, K = 8192, 2048


@pytest.mark.parametrize("M", [1, 2, 4, 6, 8, 9])
@pytest.mark.parametrize(("quant", "precision"), [("q4g64", "int8"), ("q8g64", "int8"), ("bf16", "bf16")])
def test_matmul_rows(benchmark, cold_matrices, rows, record, quant, precision, M):
    x, weights = rows(M, K), cold_matrices(quant, N, K)
    nbytes = next(weights).nbytes
    benchmark.group = f"matmul_rows {quant} {precision}"
    benchmark.pedantic(lambda: _core.matmul_rows(x, next(weights), precision), rounds=40, warmup_rounds=4)
    median = benchmark.stats.stats.median
    record(series=f"matmul_rows_{quant}", M=M, gb_s=nbytes / median / 1e9, gmac_s=M * N * K / median / 1e9)
