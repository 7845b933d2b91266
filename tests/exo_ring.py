"""Several nodes of the real exo on loopback, as processes of their own that can be killed."""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

PYTHON = os.environ.get("SPECFAST_EXO_PYTHON")
SERVE = """
import exo.api.chatgpt_api as api
everywhere = api.ChatGPTAPI.run
async def run(self, host=None, port=52415): return await everywhere(self, host="127.0.0.1", port=port)
api.ChatGPTAPI.run = run
from exo.main import run
run()
"""
CAPABILITIES = """
import asyncio, json
from exo.topology.device_capabilities import device_capabilities
print("\\n" + json.dumps(asyncio.run(device_capabilities()).model_dump()))
"""


def free_ports(count):
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


class RunningNode:
    """One process of exo's, and what it printed."""

    def __init__(self, name, port, process):
        self.name, self.port, self.process = name, port, process
        self.lines = []
        self._reader = threading.Thread(target=lambda: self.lines.extend(process.stdout), daemon=True)
        self._reader.start()

    def printed(self):
        return "".join(self.lines)

    def request(self, method, path, body=None, timeout=60):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        headers = {"Content-Type": "application/json"} if body else {}
        connection.request(method, path, json.dumps(body) if body else None, headers)
        return connection.getresponse()

    def get(self, path):
        return json.loads(self.request("GET", path).read())

    def chat(self, text="Explain quantum computing", **body):
        """Status and answer of a chat request."""
        answer = self.request("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": text}], **body})
        return answer.status, json.loads(answer.read())

    def stream(self, **body):
        """A streamed answer, to be read."""
        messages = [{"role": "user", "content": "Explain quantum computing"}]
        return self.request("POST", "/v1/chat/completions", {"messages": messages, "stream": True, **body})

    def emitted(self):
        """Token ids of each request, in the order first told here."""
        steps = re.findall(r"on_token callbacks with request_id='([^']+)' tokens=\[([^]]*)\]", self.printed())
        requests = {request: [] for request, _ in steps}
        for request, tokens in steps:
            requests[request] += [int(token) for token in tokens.split(",")]
        return list(requests.values())

    def passes(self):
        """(tokens, laps) of each request's log line."""
        found = re.findall(r"specfast: request \w+: [^,]+, (\d+) tokens in (\d+) target passes", self.printed())
        return [(int(tokens), int(laps)) for tokens, laps in found]

    def members(self):
        return set(self.get("/v1/topology")["nodes"])

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)


def wait_until(condition, what, seconds=60):
    for _ in range(seconds * 10):
        with contextlib.suppress(OSError, KeyError, json.JSONDecodeError, http.client.HTTPException):
            if found := condition():
                return found
        time.sleep(0.1)
    raise AssertionError(what())


@contextlib.contextmanager
def ring(root, home, names, *, tokens=48, arguments=None, stock=(), environment=None, first=""):
    """Nodes on loopback that have found each other; the last name sorts first and has the first layers.

    Args:
        root: for what each node writes.
        home: an ExoHome with the checkpoints.
        names: of the nodes.
        arguments: by name; else those of "".
        stock: names of nodes that run exo without specfast.
        environment: more variables.
        first: code that each node runs first.
    """
    arguments = arguments or {}
    base = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "SPECFAST"))}
    base |= {**home.environment(), "DEBUG": "2", "PYTHONUNBUFFERED": "1", **(environment or {})}
    found = subprocess.run([PYTHON, "-c", CAPABILITIES], env=base, capture_output=True, text=True, check=True)
    capabilities = json.loads(found.stdout.splitlines()[-1])
    ports = free_ports(2 * len(names))
    peers = {
        name: {"address": "127.0.0.1", "port": port, "device_capabilities": capabilities}
        for name, port in zip(names, ports, strict=False)
    }
    nodes = []
    try:
        for i, name in enumerate(names):
            folder = Path(root) / name
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "peers.json").write_text(json.dumps({"peers": peers}))
            more = arguments.get(name, arguments.get("", ()))
            command = [
                *(PYTHON, "-c", first + SERVE, *more, "--disable-tui", "--discovery-module", "manual"),
                *("--discovery-config-path", str(folder / "peers.json"), "--node-host", "127.0.0.1"),
                *("--node-port", str(ports[i]), "--chatgpt-api-port", str(ports[len(names) + i]), "--node-id", name),
                *("--max-generate-tokens", str(tokens)),
            ]
            own = {**base, **({"SPECFAST_EXO_HOOK": "0"} if name in stock else {})}
            process = subprocess.Popen(command, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            nodes.append(RunningNode(name, ports[len(names) + i], process))
        for node in nodes:
            wait_until(lambda node=node: node.members() == set(names), lambda node=node: node.printed()[-3000:])
        yield {node.name: node for node in nodes}
    finally:
        for node in nodes:
            if node.process.poll() is None:
                node.process.send_signal(signal.SIGKILL)
        for node in nodes:
            node.process.wait(10)
