"""matmul_rows on cold 4-bit, 8-bit and bf16 weights: T(M) beside the roofline of the same seconds."""

import numpy as np
import pytest
from specfast import _core

N, K = 8192, 2048


@pytest.mark.parametrize("M", [1, 2, 4, 6, 8, 9])
@pytest.mark.parametrize(("quant", "precision"), [("q4g64", "int8"), ("q8g64", "int8"), ("bf16", "bf16")])
def test_matmul_rows(benchmark, cold_matrices, rows, record, big, quant, precision, M):
    x, weights = rows(M, K), cold_matrices(quant, N, K)
    nbytes = next(weights).nbytes
    machine = []

    def look_at_the_machine():
        machine.append((_core.read_bandwidth(big), _core.peak_dot(precision, milliseconds=5.0)))
        return (), {}

    benchmark.group = f"matmul_rows {quant} {precision}"
    benchmark.pedantic(
        lambda: _core.matmul_rows(x, next(weights), precision), setup=look_at_the_machine, rounds=40, warmup_rounds=4
    )
    median = benchmark.stats.stats.median
    bandwidth, peak = np.median(machine, axis=0) * 1e9
    roofline = max(nbytes / bandwidth, M * N * K / peak)
    record(series=f"matmul_rows_{quant}", M=M, gb_s=nbytes / median / 1e9, roofline_s=roofline)
