"""What the benchmarks share: a record of the machine, and weights larger than a last-level cache."""

import itertools

import numpy as np
import pytest
from specfast import _core
from specfast.bench.machine import environment
from specfast.bench.random_model import Maker


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["specfast"] = environment()


@pytest.fixture(scope="session")
def cold_matrices():
    """A function (quant, N, K) -> an endless cycle of equal matrices, together more than 64 MB."""
    made = {}

    def cycle(quant, N, K):
        if (quant, N, K) not in made:
            make = Maker(quant, 0)
            first = make.matrix(N, K)
            count = max(2, (96 << 20) // first.nbytes)
            made[quant, N, K] = [first, *(make.matrix(N, K) for _ in range(count - 1))]
        return itertools.cycle(made[quant, N, K])

    return cycle


@pytest.fixture(scope="session")
def big():
    """128 MB to measure the bandwidth with."""
    return np.resize(np.arange(251, dtype=np.uint8), 1 << 27)


@pytest.fixture
def rows():
    """A function (M, K) -> float32 rows."""
    return lambda M, K: np.random.default_rng(0).standard_normal((M, K)).astype(np.float32)


@pytest.fixture
def record(benchmark):
    """Adds figures to a benchmark's record."""

    def add(**figures):
        benchmark.extra_info.update(isa=_core.build_info()["isa"], threads=_core.num_threads(), **figures)

    return add
