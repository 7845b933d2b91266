"""Tiny random checkpoints placed where exo's first generation expects its downloads, so that it runs offline."""

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from specfast import embedded
from tiny_directories import byte_level, write_model
from tiny_models import random_decoder

SPECIAL = ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
BOS, EOT, VOCAB = 300, 301, 320
TEMPLATE = (
    "{{ '<|begin_of_text|>' }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>' "
    "+ m['content'] + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>' }}{% endif %}"
)
PLAIN_TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
MLX = "mlx-community/"

DEEPSEEK = """
import sys, json, pathlib, mlx.core as mx
from mlx.utils import tree_flatten
from exo.inference.mlx.models.deepseek_v3 import Model, ModelArgs
folder, layers = pathlib.Path(sys.argv[1]), 61
config = dict(model_type="deepseek_v3", architectures=["DeepseekV3ForCausalLM"], vocab_size=320, hidden_size=32,
              intermediate_size=48, num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=2,
              kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, v_head_dim=16, qk_nope_head_dim=16,
              max_position_embeddings=512, rope_scaling=dict(type="yarn", factor=1.0), eos_token_id=301, bos_token_id=300)
mx.random.seed(3)
model = Model(ModelArgs.from_dict(config | {"shard": dict(model_id="x", start_layer=0, end_layer=layers - 1, n_layers=layers)}))
mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())), metadata={"format": "mlx"})
(folder / "config.json").write_text(json.dumps(config))
"""


@dataclass(frozen=True)
class ExoHome:
    """Two folders exo is told of: EXO_HOME with the downloads, and TMPDIR with what it knows of repositories."""

    home: Path
    tmp: Path

    def environment(self):
        """Variables that keep exo inside, off the network, and without what specfast measured before."""
        return {
            "EXO_HOME": str(self.home),
            "TMPDIR": str(self.tmp),
            "HF_HOME": str(self.home / "hub"),
            "HF_HUB_OFFLINE": "1",
            "HF_ENDPOINT": "http://127.0.0.1:9",
            "no_proxy": "127.0.0.1,localhost",
            "SPECFAST_MEASUREMENTS": "0",
        }

    def folder(self, repository):
        folder = self.home / "downloads" / repository.replace("/", "--")
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def seal(self, repository):
        """Writes what exo would have learned of a repository from the hub."""
        folder, known = self.folder(repository), self.tmp / "exo"
        known.mkdir(parents=True, exist_ok=True)
        files = [{"path": file.name, "size": file.stat().st_size} for file in sorted(folder.iterdir())]
        (known / f"{repository.replace('/', '--')}--main--file_list.json").write_text(json.dumps(files))
        index = known / repository.replace("/", "--") / "model.safetensors.index.json"
        index.parent.mkdir(exist_ok=True)
        index.write_text((folder / "model.safetensors.index.json").read_text())

    def add_deepseek(self, python):
        """Places a random DeepSeek V3, float32, written by exo's own code in the environment of an interpreter."""
        repository = MLX + "DeepSeek-V3-4bit"
        folder = self.folder(repository)
        write_chat_tokenizer(folder, byte_level("<|begin_of_text|>", "<|eot_id|>", "<|deepseek|>", start=None))
        hidden = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "SPECFAST"))}
        environment = {**hidden, **self.environment()}
        subprocess.run([python, "-c", DEEPSEEK, str(folder)], check=True, env=environment)
        self.seal_weights(folder)
        self.seal(repository)

    def add(self, repository, decoder, *, architecture="llama", tokenizer=None, eos=EOT, **config):
        """Places a random Llama or Qwen2 decoder."""
        folder = self.folder(repository)
        kind = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[architecture]
        write_model(folder, decoder, eos=eos, architectures=[kind], model_type=architecture, **config)
        write_chat_tokenizer(folder, tokenizer or byte_level(*SPECIAL, start=None))
        self.seal_weights(folder)
        self.seal(repository)

    def add_embedded(self, repository, role):
        """Places one of the embedded pair, with a chat template that is the message itself."""
        folder = self.folder(repository)
        shutil.copytree(embedded.path(role), folder, dirs_exist_ok=True)
        config = json.loads((folder / "tokenizer_config.json").read_text())
        config |= {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": PLAIN_TEMPLATE}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        self.seal_weights(folder)
        self.seal(repository)

    @staticmethod
    def seal_weights(folder):
        from safetensors import safe_open

        with safe_open(folder / "model.safetensors", "np") as weights:
            names = dict.fromkeys(weights.keys(), "model.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def write_chat_tokenizer(folder, tokenizer):
    """A tokenizer that transformers loads, with Llama 3's chat markers."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot_id|>",
        "chat_template": TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 8192,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def deep_decoder(layers, *, seed=5, architecture="llama"):
    """`layers` random layers of which only the first two matter much, so that these two are a good draft.

    Special tokens and padding are never the likeliest.
    """
    decoder = random_decoder(seed, V=VOCAB, layers=layers, head_dim=8, tied=False, architecture=architecture)
    decoder.head[BOS:] = 0
    for layer in decoder.layers[2:]:
        layer.o, layer.down = 0.02 * layer.o, 0.02 * layer.down
    return decoder


def drafting(decoder, *, noise=0.0, seed=1):
    """The first two layers of a deep decoder, with noise on the head for more rejections."""
    rng = np.random.default_rng(seed)
    head = decoder.head + rng.normal(0, noise * decoder.head.std(), decoder.head.shape)
    head[BOS:] = 0
    return type(decoder)(**{**vars(decoder), "layers": decoder.layers[:2], "head": head})


def make_home(root, models=("llama", "qwen")):
    """The checkpoints of the document's single-machine commands, tiny; the registry's numbers of layers."""
    exo = ExoHome(root / "home", root / "tmp")
    for folder in (exo.home, exo.tmp):
        folder.mkdir(parents=True, exist_ok=True)
    if "llama" in models:
        target = deep_decoder(32)
        exo.add(MLX + "Meta-Llama-3.1-8B-Instruct-4bit", target, max_context=2048)
        exo.add(MLX + "Llama-3.2-3B-Instruct-4bit", drafting(target, noise=0.3), max_context=2048)
        exo.add(MLX + "Llama-3.2-1B-Instruct-4bit", drafting(target, noise=0.5), max_context=2048)
        exo.add(MLX + "Meta-Llama-3.1-70B-Instruct-4bit", deep_decoder(80), max_context=2048)
    if "qwen" in models:
        other = byte_level(*SPECIAL, "<|im_end|>", start=None)
        target = deep_decoder(28, seed=6, architecture="qwen2")
        options = {"architecture": "qwen2", "tokenizer": other, "max_context": 2048}
        exo.add(MLX + "Qwen2.5-7B-Instruct-4bit", target, **options)
        exo.add(MLX + "Qwen2.5-1.5B-Instruct-4bit", drafting(target, noise=0.3), **options)
        exo.add(MLX + "Qwen2.5-0.5B-Instruct-4bit", drafting(target, noise=0.5), **options)
        exo.add(MLX + "Qwen2.5-3B-Instruct-4bit", drafting(target, noise=0.4), **options)
    return exo
