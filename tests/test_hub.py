"""Downloading by repo id, against a hub on loopback: complete, cached, resumed, and every refusal with its remedy."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from gguf_writer import decoder_metadata, decoder_tensors, write_gguf
from random_checkpoints import write_checkpoint
from specfast import hub
from specfast.checkpoint import load_model
from specfast.errors import ModelFormatError
from tiny_models import random_decoder

COMMIT = "a" * 40
SCRIPT = """
import sys
from specfast import hub
from specfast.errors import SpecfastError
try:
    print(hub.resolve(sys.argv[1], metadata_only=len(sys.argv) > 2))
except SpecfastError as error:
    print(type(error).__name__, error)
"""


class Hub(BaseHTTPRequestHandler):
    """The few endpoints a snapshot download uses."""

    files: dict
    requests: list
    status = 0  # answers everything with this status, if set; -1 closes the connection
    cut = 0  # weights are cut off after so many bytes this many times

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", headers=()):
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.requests.append((self.command, self.path))
        if self.status:
            return self.connection.close() if self.status < 0 else self.answer(self.status, b"{}")
        path = self.path.split("?")[0]
        if "org/gated" in path:
            return self.answer(403, b"{}", [("X-Error-Code", "GatedRepo"), ("X-Error-Message", "Access is restricted")])
        if "org/model" not in path:
            return self.answer(
                404, b"{}", [("X-Error-Code", "RepoNotFound"), ("X-Error-Message", "Repository not found")]
            )
        if path.startswith("/api/models/org/model/tree"):
            tree = [
                {"type": "file", "path": n, "size": len(b), "oid": hashlib.sha1(b).hexdigest()}
                for n, b in self.files.items()
            ]
            return self.answer(200, json.dumps(tree).encode(), [("Content-Type", "application/json")])
        if path.startswith("/api/models/org/model"):
            info = {"id": "org/model", "sha": COMMIT, "siblings": [{"rfilename": n} for n in self.files]}
            return self.answer(200, json.dumps(info).encode(), [("Content-Type", "application/json")])
        name = path.rsplit("/", 1)[-1]
        if name not in self.files:
            return self.answer(404, b"", [("X-Error-Code", "EntryNotFound"), ("X-Repo-Commit", COMMIT)])
        body = self.files[name]
        common = [
            ("ETag", f'"{hashlib.sha256(body).hexdigest()}"'),
            ("X-Repo-Commit", COMMIT),
            ("Accept-Ranges", "bytes"),
        ]
        first = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        if self.command == "GET" and name.endswith(".safetensors") and type(self).cut > 0:
            type(self).cut -= 1
            self.send_response(200)
            for header, value in (*common, ("Content-Length", str(len(body)))):
                self.send_header(header, value)
            self.end_headers()
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.connection.close()
            return None
        if first:
            span = ("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
            return self.answer(206, body[first:], [*common, span])
        return self.answer(200, body, common)


@contextmanager
def serving(files):
    handler = type("Handler", (Hub,), {"files": files, "requests": [], "cut": 0})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler
    finally:
        server.shutdown()


@pytest.fixture
def files(tmp_path):
    directory = write_checkpoint(tmp_path / "source", "llama")
    (directory / "tokenizer.json").write_text("{}")
    (directory / "pytorch_model.bin").write_bytes(b"never fetched")
    (directory / "modeling.py").write_text("raise SystemExit('never run')")
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def resolve(name, endpoint, home, *more, **extra):
    environment = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "*",
        **extra,
    }
    environment.pop("HF_HUB_OFFLINE", None) if "HF_HUB_OFFLINE" not in extra else None
    command = [sys.executable, "-c", SCRIPT, name, *more]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=True
    ).stdout.strip()


def test_download_then_cache(tmp_path, files):
    with serving(files) as (endpoint, handler):
        directory = resolve("org/model", endpoint, tmp_path / "home")
        fetched = sorted(os.listdir(directory))
        assert fetched == ["config.json", "model.safetensors", "tokenizer.json"]
        for name in fetched:
            with open(os.path.join(directory, name), "rb") as file:
                assert file.read() == files[name]
        handler.requests.clear()
        assert resolve("org/model", endpoint, tmp_path / "home") == directory
        assert not [path for method, path in handler.requests if method == "GET" and "safetensors" in path]
    assert resolve("org/model", "http://127.0.0.1:9", tmp_path / "home", HF_HUB_OFFLINE="1") == directory


def test_metadata_fetches_no_weights(tmp_path, files):
    with serving(files) as (endpoint, handler):
        directory = resolve("org/model", endpoint, tmp_path / "home", "metadata")
        assert sorted(os.listdir(directory)) == ["config.json", "tokenizer.json"]
        assert not [path for _, path in handler.requests if "resolve" in path and "safetensors" in path]


def test_a_broken_transfer_is_made_good(tmp_path, files):
    with serving(files) as (endpoint, handler):
        handler.cut = 1
        first = resolve("org/model", endpoint, tmp_path / "home")
        directory = (
            first if not first.startswith("DownloadError") else resolve("org/model", endpoint, tmp_path / "home")
        )
        with open(os.path.join(directory, "model.safetensors"), "rb") as file:
            assert file.read() == files["model.safetensors"]


def test_transfers_that_always_break(tmp_path, files):
    with serving(files) as (endpoint, handler):
        handler.cut = 1000
        assert resolve("org/model", endpoint, tmp_path / "home").startswith("DownloadError org/model could not be")
        handler.cut = 0
        directory = resolve("org/model", endpoint, tmp_path / "home")
        with open(os.path.join(directory, "model.safetensors"), "rb") as file:
            assert file.read() == files["model.safetensors"]


@pytest.mark.parametrize(
    ("status", "remedy"), [(401, "log in"), (429, "try again later"), (500, "try again later"), (-1, "")]
)
def test_a_hub_that_fails(tmp_path, files, status, remedy):
    with serving(files) as (endpoint, handler):
        handler.status = status
        answer = resolve("org/model", endpoint, tmp_path / "home")
    assert answer.startswith("DownloadError org/model")
    assert remedy in answer


def test_a_repository_of_pickled_weights(tmp_path, files):
    del files["model.safetensors"]
    with serving(files) as (endpoint, _):
        answer = resolve("org/model", endpoint, tmp_path / "home")
        assert answer.startswith("DownloadError org/model: no *.safetensors")
        assert not resolve("org/model", endpoint, tmp_path / "home", "metadata").startswith("DownloadError")


@pytest.fixture
def gguf_files(tmp_path):
    decoder = random_decoder(3, V=96, hidden=64, heads=2, kv_heads=1, head_dim=32, layers=2)
    files = {"README.md": b"", "mmproj-Q8_0.gguf": b"never fetched", "config.json": b"{}"}
    for kind in ("Q4_0", "Q8_0"):
        path = tmp_path / "written.gguf"
        write_gguf(path, decoder_metadata(decoder, "llama"), decoder_tensors(decoder, "llama", kind)[0])
        files[f"tiny-{kind}.gguf"] = path.read_bytes()
    return files


def test_gguf_files(tmp_path, gguf_files):
    with serving(gguf_files) as (endpoint, handler):
        for name in ("org/model/tiny-Q8_0.gguf", "org/model:Q8_0", "org/model:q8_0"):
            path = resolve(name, endpoint, tmp_path / "home")
            assert path.endswith("/tiny-Q8_0.gguf")
            assert load_model(Path(path)).config.vocab == 96
        assert not [path for _, path in handler.requests if "resolve" in path and "tiny-Q8_0" not in path]
        wrong = resolve("org/model:Q2_K", endpoint, tmp_path / "home")
        assert wrong.startswith(
            "DownloadError no file 'org/model:Q2_K' is here, and on the hub: org/model has no GGUF file"
        )
        assert "org/model/file.gguf or org/model:Q4_K_M" in resolve("org/model", endpoint, tmp_path / "home")
    assert resolve("org/model:Q8_0", "http://127.0.0.1:9", tmp_path / "home", HF_HUB_OFFLINE="1") == path


def test_a_gguf_name_that_stands_for_several(tmp_path, gguf_files):
    files = {**gguf_files, "other-Q8_0.gguf": gguf_files["tiny-Q8_0.gguf"]}
    with serving(files) as (endpoint, _):
        answer = resolve("org/model:Q8_0", endpoint, tmp_path / "home")
    assert answer.endswith("stands for other-Q8_0.gguf, tiny-Q8_0.gguf; name one, as org/model/other-Q8_0.gguf")


def test_refusals(tmp_path, files):
    with serving(files) as (endpoint, _):
        assert resolve("org/none", endpoint, tmp_path / "home").startswith("DownloadError org/none is not on the hub")
        gated = resolve("org/gated", endpoint, tmp_path / "home")
        assert gated.startswith("DownloadError org/gated is gated")
        assert "log in" in gated
    unreachable = resolve("org/model", "http://127.0.0.1:9", tmp_path / "home")
    assert unreachable.startswith("DownloadError org/model")


@pytest.mark.parametrize("name", ["no-such-model", "./missing", "/missing/dir", "a/b/c", ""])
def test_names_that_are_nothing(name):
    with pytest.raises(ModelFormatError, match="no such model"):
        hub.resolve(name or "?")
