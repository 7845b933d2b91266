"""The thread pool on a busy machine: fewer threads where some are kept off their cores, and every part computed once."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FULL = os.environ.get("SPECFAST_FULL") == "1"


@pytest.mark.parametrize("sanitizer", [None, "thread", "address,undefined"])
def test_calls_of_changing_numbers_of_threads(tmp_path, sanitizer):
    if sanitizer and not FULL:
        pytest.skip("sanitizers run with SPECFAST_FULL=1")
    compiler = shutil.which("g++") or shutil.which("c++")
    program = tmp_path / "thread_pool_test"
    flags = [f"-fsanitize={sanitizer}", "-g"] if sanitizer else []
    sources = [ROOT / "tests/cpp/thread_pool_test.cpp", ROOT / "csrc/thread_pool.cpp"]
    warnings = ["-Wall", "-Wextra", "-Werror"]
    subprocess.run(
        [compiler, "-std=c++20", "-O2", *warnings, *flags, "-pthread", f"-I{ROOT / 'csrc'}", *sources, "-o", program],
        check=True,
    )
    done = subprocess.run([program, "20" if FULL else "2"], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
