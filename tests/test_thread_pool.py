"""The thread pool leaves the caller's core alone, does with the threads it gets, and is not made larger than the machine."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import specfast
from specfast import _core
from specfast.errors import ConfigurationError

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


REFUSED = """
import resource
import numpy as np
import specfast
from specfast import _core

x = np.random.default_rng(1).standard_normal((3, 256)).astype(np.float32)
matrix = _core.Matrix("f32", 256, 256, np.random.default_rng(2).standard_normal((256, 256)).astype(np.float32).view(np.uint8))
_core.set_num_threads(1)
alone = _core.matmul_rows(x, matrix, "f32")
resource.setrlimit(resource.RLIMIT_STACK, (8 << 20, resource.getrlimit(resource.RLIMIT_STACK)[1]))
mapped = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
limits = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (mapped + (64 << 20), limits[1]))
_core.set_num_threads(100)
assert np.array_equal(_core.matmul_rows(x, matrix, "f32"), alone)
started = _core.start_threads()
assert 1 <= started < 100, started
resource.setrlimit(resource.RLIMIT_AS, limits)
said = []
specfast.engine.Engine(max_context=64, notify=said.append).pair
assert [text for text in said if f"started {started} of 100 threads" in text and "ulimit -u" in text], said
_core.set_num_threads(1)
assert _core.start_threads() == 1
print("well")
"""


def test_threads_that_cannot_start_are_done_without():
    """Every stack takes 8 MB of address space, of which 64 MB are left."""
    run = subprocess.run([sys.executable, "-c", REFUSED], check=False, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, "well\n"), run.stderr


def test_more_threads_than_cpus_are_cut_and_said():
    before, said = _core.num_threads(), []
    usable = _core.usable_cpus()
    assert 1 <= usable <= len(os.sched_getaffinity(0))
    try:
        specfast.inference.set_threads(usable, said.append)
        assert (_core.num_threads(), said) == (usable, [])
        specfast.inference.set_threads(usable + 7, said.append)
        assert _core.num_threads() == usable
        assert len(said) == 1
        assert f"{usable + 7} threads" in said[0]
        assert f"{usable} CPUs" in said[0]
        with pytest.raises(ConfigurationError, match="1 to 256"):
            specfast.inference.set_threads(257)
    finally:
        _core.set_num_threads(before)
