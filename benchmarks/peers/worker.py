"""One peer in a process of its own: the parent's handle, and the child that blocks in a read while it is not its turn.

A process each keeps apart what cannot share one (two OpenMP runtimes, thread pools), and makes an idle peer's CPU use measurable.
`python worker.py` speaks lines of JSON: a request on standard input, an answer on what was standard output at start.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

# NumPy asks for transparent huge pages, so specfast's random weights have them; with this, memory of glibc's malloc has them too.
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
SETTLE_SECONDS = 0.03  # after a turn, for thread pools to stop spinning and sleep


class PeerError(RuntimeError):
    """A peer failed; the message names its log."""


class Worker:
    """The parent's handle of one peer with one model."""

    def __init__(self, engine: str, shape: str, cache: Path) -> None:
        self.engine, self.shape = engine, shape
        self.about: dict[str, Any] = {}
        self.busy_seconds = 0.0  # CPU time of the child so far
        self.idle_seconds = self.idle_cpu_seconds = 0.0  # between turns
        logs = cache / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        self.log = logs / f"{engine}-{shape}.log"
        with self.log.open("w") as log:
            self.child = subprocess.Popen(
                [sys.executable, __file__, engine, shape, str(cache)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env={**os.environ, **HUGE_PAGES},
            )  # fmt: skip

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self.child.stdin
        assert self.child.stdout
        try:
            self.child.stdin.write(json.dumps(request) + "\n")
            self.child.stdin.flush()
            line = self.child.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self.child.wait()
            last = "\n".join(self.log.read_text().strip().splitlines()[-3:])
            raise PeerError(f"{self.engine} stopped with status {self.child.returncode}; {self.log} ends:\n{last}")
        answer: dict[str, Any] = json.loads(line)
        self.busy_seconds = answer["cpu_seconds"]
        return answer

    def prepare(self) -> None:
        """Makes the model files that are missing."""
        self._ask(do="prepare")

    def start(self, context: int, threads: int) -> None:
        """Loads the model and fills its cache."""
        self.about = self._ask(do="start", context=context, threads=threads)["about"]

    def turn(self, rows: list[int]) -> list[float]:
        """Seconds of one pass for each row count, after an untimed pass that wakes the threads."""
        answer = self._ask(do="turn", rows=rows)
        self.idle_seconds += answer["idle_seconds"]
        self.idle_cpu_seconds += answer["idle_cpu_seconds"]
        seconds: list[float] = answer["seconds"]
        return seconds

    def stop(self) -> None:
        """Ends the child."""
        assert self.child.stdin
        with contextlib.suppress(BrokenPipeError):
            self.child.stdin.close()
        try:
            self.child.wait(10)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()


def _serve(engine: str, shape: str, cache: Path) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to the log
    from engines import ENGINES  # noqa: PLC0415

    module, peer, idle_since = ENGINES[engine].load(), None, (0.0, 0.0)
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any] = {}
        if request["do"] == "prepare":
            module.prepare(shape, cache)
        elif request["do"] == "start":
            peer = module.start(shape, request["context"], request["threads"], cache)
            answer["about"] = peer.about
        else:
            assert peer
            answer["idle_seconds"] = time.monotonic() - idle_since[0]
            answer["idle_cpu_seconds"] = time.process_time() - idle_since[1]
            peer.rows(1)
            answer["seconds"] = [peer.rows(M) for M in request["rows"]]
        time.sleep(SETTLE_SECONDS)
        idle_since = time.monotonic(), time.process_time()
        answers.write(json.dumps({**answer, "cpu_seconds": time.process_time()}) + "\n")
        answers.flush()


if __name__ == "__main__":
    _serve(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
