"""The thread pool leaves the caller's core alone."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from specfast import _core

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or len(os.sched_getaffinity(0)) < 2, reason="needs Linux and two cores"
)
BUFFER = np.zeros(1 << 24, dtype=np.uint8)


def cores_of_threads():
    """Thread id -> the core it ran on last."""
    tasks = Path("/proc/self/task").iterdir()
    return {int(task.name): int((task / "stat").read_text().rpartition(")")[2].split()[36]) for task in tasks}


@pytest.fixture
def worker():
    """The id of a pool of two threads' other thread."""
    threads = _core.num_threads()
    _core.set_num_threads(1)
    _core.read_bandwidth(BUFFER)
    before = set(cores_of_threads())
    _core.set_num_threads(2)
    _core.read_bandwidth(BUFFER)
    (started,) = set(cores_of_threads()) - before
    yield started
    _core.set_num_threads(threads)


def test_a_worker_on_the_callers_core_moves(worker):
    allowed = os.sched_getaffinity(0)
    for _ in range(5):
        taken = cores_of_threads()[worker]
        os.sched_setaffinity(0, {taken})  # this thread alone
        try:
            for _ in range(3):
                _core.read_bandwidth(BUFFER)
            assert cores_of_threads()[worker] != taken
            assert os.sched_getaffinity(worker) == allowed
        finally:
            os.sched_setaffinity(0, allowed)


def test_one_allowed_core_still_works(worker):
    allowed = os.sched_getaffinity(0)
    only = {min(allowed)}
    os.sched_setaffinity(0, only)
    os.sched_setaffinity(worker, only)
    try:
        assert _core.read_bandwidth(BUFFER) > 0
        assert os.sched_getaffinity(worker) == only
    finally:
        os.sched_setaffinity(worker, allowed)
        os.sched_setaffinity(0, allowed)
