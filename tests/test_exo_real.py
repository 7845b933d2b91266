"""The document's single-machine commands on the real exo, offline and on loopback, with tiny checkpoints."""

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

import numpy as np
import pytest
from exo_home import MLX, VOCAB, deep_decoder, drafting, make_home, write_chat_tokenizer
from oracle.chi_square import excess
from oracle.law import law_rows
from oracle.model import forward
from tiny_directories import byte_level, write_model
from tiny_models import random_decoder
from tokenizers import Tokenizer, models, pre_tokenizers

PYTHON = os.environ.get("SPECFAST_EXO_PYTHON")
pytestmark = pytest.mark.skipif(
    PYTHON is None, reason="SPECFAST_EXO_PYTHON does not name the interpreter of an environment with exo (docs/exo.md)"
)
PROMPT = "Explain quantum computing"
TOKENS = 48
CHI_SQUARE_TEXTS = 4000 if os.environ.get("SPECFAST_FULL") == "1" else 1200
SERVE = """
import exo.api.chatgpt_api as api
everywhere = api.ChatGPTAPI.run
async def run(self, host=None, port=52415): return await everywhere(self, host="127.0.0.1", port=port)
api.ChatGPTAPI.run = run
from exo.main import run
run()
"""
TINYGRAD = """
import asyncio, json, sys
from pathlib import Path
from exo.api.chatgpt_api import Message, build_prompt
from exo.inference.shard import Shard
from exo.inference.tinygrad import inference
from exo.download.new_shard_download import new_shard_downloader
from exo.inference.tokenizers import resolve_tokenizer
folder, prompt, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
config = json.loads((folder / "config.json").read_text())
inference.MODEL_PARAMS["8B"]["args"] = dict(
    dim=config["hidden_size"], n_heads=config["num_attention_heads"], n_kv_heads=config["num_key_value_heads"],
    n_layers=config["num_hidden_layers"], norm_eps=config["rms_norm_eps"], rope_theta=config["rope_theta"],
    vocab_size=config["vocab_size"], hidden_dim=config["intermediate_size"])
class Normed(inference.TransformerShard):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        if sys.argv[4] == "normed": self.post = lambda x: self.output(self.norm(x))
inference.TransformerShard = Normed
async def main():
    engine = inference.TinygradDynamicShardInferenceEngine(new_shard_downloader())
    shard, found = Shard("llama-3.1-8b", 0, 31, 32), []
    tokenizer = await resolve_tokenizer(folder)
    pending = (await engine.encode(shard, build_prompt(tokenizer, [Message("user", prompt)]))).reshape(1, -1)
    while len(found) < count:
        rows, _ = await engine.infer_tensor("one", shard, pending)
        found.append(int(rows[0, -1].argmax()))
        pending = rows[:, -1].argmax(-1).reshape(1, 1)
    print("ids", json.dumps(found))
asyncio.run(main())
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Exo:
    """Runs the real exo on a folder of checkpoints."""

    def __init__(self, root):
        self.root, self.files = root, make_home(root)
        root.joinpath("peers.json").write_text('{"peers": {}}')

    def environment(self):
        hidden = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "SPECFAST"))}
        return {**hidden, **self.files.environment(), "DEBUG": "2", "PYTHONUNBUFFERED": "1"}

    def arguments(self, *extra):
        return [
            *("--disable-tui", "--discovery-module", "manual", "--node-host", "127.0.0.1", "--node-id", "one"),
            *("--discovery-config-path", str(self.root / "peers.json"), "--node-port", str(free_port())),
            *extra,
        ]

    def run(self, *arguments, program=("exo",), code=0):
        """Runs `exo run ...` as a user types it; returns the token ids it emitted and all it printed."""
        start = [str(Path(PYTHON).parent / program[0]), *program[1:]]
        command = [*start, *arguments, *self.arguments("--max-generate-tokens", str(TOKENS))]
        done = subprocess.run(command, env=self.environment(), capture_output=True, text=True, timeout=120, check=False)
        printed = done.stdout + done.stderr
        assert done.returncode == code, printed[-3000:]
        return emitted(printed), printed

    @contextlib.contextmanager
    def serve(self, *arguments):
        """`exo ...` as a server, its API on loopback."""
        port = free_port()
        command = [PYTHON, "-c", SERVE, *arguments, *self.arguments("--chatgpt-api-port", str(port), "--max-generate-tokens", str(TOKENS))]  # fmt: skip
        process = subprocess.Popen(
            command, env=self.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        lines = []
        reader = threading.Thread(target=lambda: lines.extend(process.stdout), daemon=True)
        reader.start()
        server = Server(port, lines)
        try:
            server.wait_until_up(process)
            yield server
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
            reader.join(5)


class Server:
    def __init__(self, port, lines):
        self.port, self.lines = port, lines

    def printed(self):
        return "".join(self.lines)

    def wait_until_up(self, process, seconds=60):
        for _ in range(seconds * 5):
            assert process.poll() is None, self.printed()[-3000:]
            try:
                self.get("/healthcheck")
                return
            except OSError:
                time.sleep(0.2)
        raise AssertionError(self.printed()[-3000:])

    def get(self, path):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("GET", path)
        return json.loads(connection.getresponse().read())

    def post(self, **body):
        body = {"messages": [{"role": "user", "content": PROMPT}], **body}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        return connection.getresponse()

    def chat(self, **body):
        answer = self.post(**body)
        return answer.status, json.loads(answer.read())

    def wait_for(self, condition, seconds=20):
        for _ in range(seconds * 10):
            if found := condition():
                return found
            time.sleep(0.1)
        raise AssertionError(self.printed()[-3000:])


def emitted(printed):
    steps = re.findall(r"on_token callbacks with request_id='([^']+)' tokens=\[([^]]*)\]", printed)
    requests = {request: [] for request, _ in steps}
    for request, tokens in steps:
        requests[request] += [int(token) for token in tokens.split(",")]
    assert len(requests) <= 1
    return next(iter(requests.values()), [])


def passes(printed):
    """(tokens, target passes) of a request's log line."""
    found = re.search(r"specfast: request \w+: [^,]+, (\d+) tokens in (\d+) target passes", printed)
    return int(found[1]), int(found[2])


@pytest.fixture(scope="module")
def exo(tmp_path_factory):
    return Exo(tmp_path_factory.mktemp("exo"))


@pytest.fixture(scope="module")
def plain(exo):
    """Token ids of exo's own mlx engine."""
    return {
        model: exo.run("run", model, "--inference-engine", "mlx", "--prompt", PROMPT)[0]
        for model in ("llama-3.1-8b", "qwen-2.5-7b")
    }


LLAMA = ("--speculative-target-model", "llama-3.1-8b")
QWEN = ("--speculative-target-model", "qwen-2.5-7b")
RUNS = {
    "llama": ("run", "llama-3.1-8b", *LLAMA, "--speculative-draft-model", "llama-3.2-3b"),
    "qwen": ("run", "qwen-2.5-7b", *QWEN, "--speculative-draft-model", "qwen-2.5-1.5b", "--speculative-auto-config"),
    "llama, auto": ("run", "llama-3.1-8b", *LLAMA, "--speculative-auto-config"),
    "target is what is asked for": ("run", "llama-3.1-8b", "--speculative-draft-model", "llama-3.2-1b"),
    "tinygrad": ("run", "llama-3.1-8b", "--speculative-draft-model", "llama-3.2-1b", "--speculative-draft-engine", "mlx"),
}  # fmt: skip


@pytest.mark.parametrize("arguments", RUNS.values(), ids=list(RUNS))
def test_run_gives_the_ids_of_exos_own_engine(exo, plain, arguments):
    tokens, printed = exo.run(
        *arguments, "--inference-engine", "speculative", "--prompt", PROMPT, "--speculative-temperature", "0",
        "--speculative-gamma", "4",
    )  # fmt: skip
    assert tokens == plain[arguments[1]]
    made, in_passes = passes(printed)
    assert made == len(tokens) > 1.2 * in_passes
    assert "fallback: none" in printed
    assert "nanobind" not in printed


HOSTS = ["native", "mlx", "tinygrad"]


@pytest.fixture(scope="module")
def on_tinygrad(exo):
    """The same target and draft where exo has tinygrad's checkpoints."""
    target = deep_decoder(32)
    exo.files.add("mlabonne/Meta-Llama-3.1-8B-Instruct-abliterated", target, max_context=2048)
    exo.files.add("unsloth/Llama-3.2-3B-Instruct", drafting(target, noise=0.3), max_context=2048)
    return exo


@pytest.mark.parametrize("draft", HOSTS)
@pytest.mark.parametrize("target", HOSTS)
def test_every_pair_of_hosts_gives_the_ids_of_exos_own_engine(on_tinygrad, plain, target, draft):
    tokens, printed = on_tinygrad.run(
        *RUNS["llama"], "--inference-engine", "speculative", "--prompt", PROMPT, "--speculative-temperature", "0",
        "--speculative-gamma", "4", "--speculative-target-engine", target, "--speculative-draft-engine", draft,
    )  # fmt: skip
    assert tokens == plain["llama-3.1-8b"]
    made, in_passes = passes(printed)
    assert made == len(tokens) > 1.2 * in_passes
    assert f", engine {target}" in printed
    assert "runs in specfast's own decoder" not in printed
    assert (f"on the {target} host" in printed) == (target != "native")


@pytest.mark.parametrize("norm", ["normed", "as it is"])
def test_exos_own_tinygrad_shard_has_the_same_ids_once_its_norm_is_applied(on_tinygrad, plain, norm):
    folder = on_tinygrad.files.folder("mlabonne/Meta-Llama-3.1-8B-Instruct-abliterated")
    command = [PYTHON, "-c", TINYGRAD, str(folder), PROMPT, str(TOKENS), norm]
    done = subprocess.run(
        command, env=on_tinygrad.environment(), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(re.search(r"^ids (.*)$", done.stdout, re.MULTILINE)[1])
    assert (found == plain["llama-3.1-8b"]) == (norm == "normed")


def test_run_as_the_document_has_it(exo):
    """Word for word, sampled at the family's temperature."""
    for arguments in RUNS["llama"], RUNS["qwen"]:
        tokens, printed = exo.run(*arguments, "--inference-engine", "speculative", "--prompt", PROMPT)
        assert len(tokens) == TOKENS
        assert "fallback: none" in printed


def test_disabled(exo, plain):
    tokens, printed = exo.run(
        "run", "llama-3.1-8b", "--inference-engine", "speculative", *LLAMA, "--disable-speculative",
        "--default-temp", "0", "--prompt", PROMPT,
    )  # fmt: skip
    assert tokens == plain["llama-3.1-8b"]
    assert "fallback: disabled" in printed
    assert "llama-3.2" not in printed


def test_time_with_every_engine(exo):
    for engine in (("speculative", *LLAMA, "--speculative-draft-model", "llama-3.2-3b"), ("mlx",)):
        _, printed = exo.run(
            "run", "llama-3.1-8b", "--inference-engine", *engine, "--prompt", "Write a story", "--time"
        )
        assert re.search(r"prompt: \d+ tokens, [\d.]+ tok/s\nfirst token: [\d.]+ s\ngeneration: 48 tokens, [\d.]+ tok/s", printed)  # fmt: skip
        assert ("acceptance: " in printed) == (engine[0] == "speculative")


def test_the_wrapper_does_the_same_without_the_hook(exo, plain, monkeypatch):
    monkeypatch.setattr(
        Exo, "environment", lambda self, inner=Exo.environment: {**inner(self), "SPECFAST_EXO_HOOK": "0"}
    )
    command = ("run", "llama-3.1-8b", "--inference-engine", "speculative", *LLAMA, "--speculative-temperature", "0", "--prompt", PROMPT)  # fmt: skip
    assert exo.run(*command, program=("specfast-exo",))[0] == plain["llama-3.1-8b"]
    assert "--speculative-target-model" in exo.run(*command, code=2)[1]


def test_deepseek_is_decoded_plainly_with_the_documented_warning(exo):
    exo.files.add_deepseek(PYTHON)
    exo.files.add(MLX + "DeepSeek-R1-Distill-Qwen-7B-4bit", drafting(deep_decoder(28)))
    arguments = ("run", "deepseek-v3", "--prompt", PROMPT)
    tokens, printed = exo.run(
        *arguments, "--inference-engine", "speculative", "--speculative-target-model", "deepseek-v3", "--speculative-auto-config",
        "--default-temp", "0",
    )  # fmt: skip
    assert (
        "Warning: Models may be incompatible for speculative decoding:\n"
        "  Target: deepseek-v3, Draft: deepseek-r1-distill-qwen-7b\n"
        "  Tokens match: False, Vocab match: True\n"
    ) in printed
    assert "decoded plainly by exo's mlx engine" in printed
    assert tokens == exo.run(*arguments, "--inference-engine", "mlx")[0]


def test_usage_errors(exo):
    base = ("run", "llama-3.1-8b", "--inference-engine", "speculative", "--prompt", PROMPT)
    _, printed = exo.run(*base, "--speculative-target-model", "qwen-2.5-7b", code=2)
    assert "llama-3.1-8b" in printed.splitlines()[-1]
    assert "qwen-2.5-7b" in printed.splitlines()[-1]
    assert "0.5 to 2" in exo.run(*base, "--speculative-lenience", "2.5", code=2)[1]
    _, printed = exo.run("--help")
    for flag in ("target-model", "draft-model", "auto-config", "gamma", "temperature", "top-k", "lenience"):
        assert f"--speculative-{flag}" in printed


def test_a_failure_ends_with_status_1_and_says_why(exo):
    folder = exo.files.folder(MLX + "Llama-3.3-70B-Instruct-4bit")
    write_model(folder, random_decoder(1, V=VOCAB, layers=2, tied=False))
    write_chat_tokenizer(folder, byte_level("<|begin_of_text|>", "<|eot_id|>", start=None))
    exo.files.seal_weights(folder)
    folder.joinpath("model.safetensors").write_bytes(folder.joinpath("model.safetensors").read_bytes()[:5000])
    exo.files.seal(MLX + "Llama-3.3-70B-Instruct-4bit")
    _, printed = exo.run("run", "llama-3.3-70b", "--inference-engine", "speculative", "--prompt", PROMPT, code=1)
    assert "model.safetensors" in next(line for line in printed.splitlines() if line.startswith("Error:"))


SERVERS = {
    "automatic": ("--speculative-target-model", "llama-3.1-8b", "--speculative-auto-config"),
    "manual": ("--speculative-target-model", "llama-3.1-8b", "--speculative-draft-model", "llama-3.2-3b"),
    "any family": (*QWEN, "--speculative-draft-model", "qwen-2.5-1.5b", "--speculative-auto-config"),
    "full": (
        *LLAMA, "--speculative-draft-model", "llama-3.2-3b", "--speculative-target-engine", "mlx", "--speculative-draft-engine", "mlx",
        "--speculative-gamma", "6", "--speculative-temperature", "1.0", "--speculative-top-k", "0.9", "--speculative-lenience", "1.1",
    ),
    "70b": ("--speculative-target-model", "llama-3.1-70b", "--speculative-auto-config"),
    "disabled": (*LLAMA, "--disable-speculative"),
}  # fmt: skip


@pytest.mark.parametrize("arguments", SERVERS.values(), ids=list(SERVERS))
def test_serving(exo, plain, arguments):
    with exo.serve("--inference-engine", "speculative", *arguments) as server:
        assert server.get("/v1/speculation")["model_family_compatibility"] == "unknown"
        status, answer = server.chat(model=arguments[1], temperature=0)
        assert status == 200, answer
        assert answer["usage"]["completion_tokens"] == TOKENS
        stats = server.get("/v1/speculation")
        speculating = "--disable-speculative" not in arguments
        assert (stats["tokens"], stats["requests"]) == (TOKENS, 1)
        if "--speculative-auto-config" not in arguments:  # which may find plain decoding faster
            assert (stats["drafted"] > 0) == speculating
        assert stats["model_family_compatibility"] == ("compatible" if speculating else "unknown")
        assert server.chat()[1]["choices"][0]["finish_reason"] == "length"  # the target is the default model
        server.wait_for(lambda: server.printed().count("specfast: request ") == 2)
    printed = server.printed()
    if arguments[1] in plain:
        first = re.search(r"on_token callbacks with request_id='([^']+)'", printed)[1]
        assert emitted("\n".join(line for line in printed.splitlines() if first in line)) == plain[arguments[1]]


def test_streams_side_by_side_and_a_client_that_leaves(exo):
    with exo.serve("--inference-engine", "speculative", *LLAMA, "--speculative-draft-model", "llama-3.2-3b") as server:
        _, alone = server.chat(temperature=0)
        answers = {}

        def stream(number):
            lines = server.post(temperature=0, stream=True).read().decode().split("\n\n")
            events = [json.loads(line.removeprefix("data: ")) for line in lines if line]
            answers[number] = "".join(event["choices"][0]["delta"]["content"] for event in events)

        threads = [threading.Thread(target=stream, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert answers[0] == answers[1]
        assert len(answers[0]) > 0
        assert alone["usage"]["completion_tokens"] == TOKENS

    with exo.serve("--inference-engine", "speculative", *LLAMA, "--max-generate-tokens", "1900") as server:
        answer = server.post(temperature=1.0, stream=True)
        answer.read(10)
        assert server.get("/v1/speculation")["under_way"] == 1
        answer.close()
        server.wait_for(lambda: server.get("/v1/speculation")["under_way"] == 0)
        assert "cancelled" in server.printed()
        assert server.chat(temperature=0, max_tokens=5)[1]["usage"]["completion_tokens"] == 5


def test_requests_for_other_models_and_bad_options(exo):
    with exo.serve("--inference-engine", "speculative", *LLAMA, "--speculative-auto-config") as server:
        assert server.chat(model="qwen-2.5-7b", temperature=0, max_tokens=16)[0] == 200
        assert server.get("/v1/speculation")["models"]["qwen-2.5-7b"]["draft"].startswith("qwen-2.5")
        status, answer = server.chat(temperature=7)
        assert (status, "0.1 to 2" in answer["detail"]) == (400, True)


def test_sampled_text_follows_the_target(exo):
    """Two tokens of a vocabulary of 8 through the chat API at temperature 1, against the exact law (false alarm 1e-6)."""
    words = ["a", "b", "c", "d", "e", "f", "<|begin_of_text|>", "<|eot_id|>"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(words[6:])
    target = random_decoder(1, V=8, layers=16, tied=False)
    for layer in target.layers[2:]:
        layer.o, layer.down = 0.02 * layer.o, 0.02 * layer.down
    repository = MLX + "Llama-3.2-1B-Instruct-8bit"
    exo.files.add(repository, target, tokenizer=tokenizer, eos=7)
    folder = exo.files.folder(repository)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": "a b c"}))
    exo.files.seal(repository)
    draft = exo.root / "draft"
    write_model(draft, drafting(target, noise=0.5), eos=7)
    tokenizer.save(str(draft / "tokenizer.json"))

    law = np.zeros((8, 8))
    for first in range(8):
        logits = forward(target, [0, 1, 2, first])[-2:]
        rows = law_rows(logits, top_k=8)
        law[first] = rows[0][first] * rows[1]
    law[7] = law[7].sum() * np.eye(8)[0]  # an end token is the last
    counts = np.zeros((8, 8))
    names = ("--speculative-target-model", "llama-3.2-1b-8bit", "--speculative-draft-model", str(draft))
    with exo.serve("--inference-engine", "speculative", *names, "--speculative-top-k", "0.1", "--speculative-gamma", "2") as server:  # fmt: skip
        for _ in range(CHI_SQUARE_TEXTS):
            status, answer = server.chat(temperature=1.0, max_tokens=2)
            assert status == 200
            text = answer["choices"][0]["message"]["content"].split()
            ids = [words.index(word) for word in text]
            counts[tuple([*ids, 0][:2])] += 1
        stats = server.get("/v1/speculation")
    assert 0 < stats["acceptance_rate"] < 1
    assert stats["drafted"] > 100
    assert excess(counts, law) < 1
    assert excess(counts, np.outer(law.sum(1), law.sum(0))) > 1  # the second token does depend on the first


def test_the_document_in_python(exo):
    """Its snippets, with exo's imports; `ShardDownloader()` is abstract in exo, `new_shard_downloader()` is not."""
    from test_document_snippets import MONITORING, USAGE

    usage = USAGE.replace(
        "from exo.download.shard_download import ShardDownloader",
        "from exo.download.new_shard_download import new_shard_downloader as ShardDownloader",
    )
    done = subprocess.run(
        [PYTHON, "-c", usage + MONITORING], env=exo.environment(), capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert "Suggested drafts: ['llama-3.2-3b', 'llama-3.2-1b']" in lines
    assert lines[-3:] == [
        "Model compatibility: unknown",
        "Model family compatibility: unknown",
        "Acceptance rate: 0.00",
    ]


def test_the_embedded_pair(exo, tmp_path):
    exo.files.add_embedded(MLX + "Llama-3.2-3B-Instruct-8bit", "target")
    exo.files.add_embedded(MLX + "Llama-3.2-3B-Instruct", "draft")
    tokens, printed = exo.run(
        "run", "llama-3.2-3b-8bit", "--inference-engine", "speculative", "--speculative-draft-model", "llama-3.2-3b-bf16",
        "--speculative-temperature", "0", "--speculative-gamma", "5", "--prompt", "import os\n\n\ndef count_lines(path):\n",
    )  # fmt: skip
    made, in_passes = passes(printed)
    assert made == len(tokens) > 1.5 * in_passes
    import specfast

    engine = specfast.load()
    text = engine.generate("import os\n\n\ndef count_lines(path):\n", max_tokens=TOKENS, temperature=0, disabled=True)
    assert tokens == text.token_ids
