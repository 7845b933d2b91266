"""Folders of exo's second generation with two tiny checkpoints, and the application on them."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

from exo_home import MLX, make_home
from exo_ring import RunningNode, free_ports, wait_until

PYTHON = os.environ.get("SPECFAST_EXO_V1_PYTHON")
MODEL, DRAFT = MLX + "Meta-Llama-3.1-8B-Instruct-4bit", MLX + "Llama-3.2-3B-Instruct-4bit"


def make_folders(root):
    """Places the checkpoints where `environment` says."""
    home = make_home(root, models=("llama",))
    for repository in (MODEL, DRAFT):
        shutil.copytree(home.folder(repository), root / "models" / repository.replace("/", "--"))
    (root / "dashboard").mkdir()


def environment(root):
    """Of exo's processes: its folders, no network, and stand-ins for what PyPI has not."""
    hidden = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "SPECFAST", "EXO"))}
    return {
        **hidden,
        "EXO_HOME": str(root / "exo"),
        "HOME": str(root),
        "EXO_DEFAULT_MODELS_DIR": str(root / "models"),
        "EXO_MODELS_DIRS": str(root / "models"),
        "EXO_DASHBOARD_DIR": str(root / "dashboard"),
        "HF_HUB_OFFLINE": "1",
        "SPECFAST_MEASUREMENTS": "0",
        "PYTHONPATH": str(Path(__file__).with_name("exo_v1_stand_ins")),
    }


class Application(RunningNode):
    """`exo` with its API and its runner, a process of its own."""

    def place(self, model):
        """Has a model loaded, and waits for its runner."""
        answer = self.request("POST", "/place_instance", {"model_id": model})
        assert answer.status == 200, answer.read()
        wait_until(lambda: any("RunnerReady" in each for each in self.get("/state")["runners"].values()), self.printed)

    def text(self, **body):
        """The whole answer to a chat request."""
        status, answer = self.chat(model=MODEL, **body)
        assert status == 200, answer
        return answer["choices"][0]["message"]["content"]


@contextlib.contextmanager
def application(root, *arguments, program="exo", **more):
    """Runs `exo ARGUMENTS` with the model placed; ended as Ctrl-C does."""
    (port,) = free_ports(1)
    command = [str(Path(PYTHON).parent / program), "--offline", "--api-port", str(port), *arguments]
    process = subprocess.Popen(
        command, env={**environment(root), **more}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    running = Application("one", port, process)
    try:
        wait_until(lambda: running.get("/state"), running.printed)
        running.place(MODEL)
        yield running
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


def drive(root, requests, *, options, more, **job):
    """What exo_v1_driver.py answers, and what it printed."""
    own = {**environment(root), **more}
    if options is not None:
        own |= {"SPECFAST_EXO": "1", "SPECFAST_EXO_OPTIONS": json.dumps(options)}
    job |= {"model": MODEL, "layers": 32, "requests": requests}
    driver = Path(__file__).with_name("exo_v1_driver.py")
    done = subprocess.run(
        [PYTHON, str(driver), json.dumps(job)], check=False, env=own, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), done.stderr
