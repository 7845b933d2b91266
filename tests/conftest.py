"""Paths and counts the tests share; what controllers measure stays in memory."""

import os
import signal
import sys
from pathlib import Path

import pytest
from specfast import _core

sys.path.insert(0, str(Path(__file__).parent))
os.environ["SPECFAST_MEASUREMENTS"] = "0"
# A shell's background jobs ignore Ctrl-C, and so would the programs that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def one_thread():
    """Native calls run on one thread."""
    before = _core.num_threads()
    _core.set_num_threads(1)
    yield
    _core.set_num_threads(before)
