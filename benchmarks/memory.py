"""Load time and peak memory of a checkpoint of a real shape, packed and in place, each in a process of its own.

`python benchmarks/memory.py` writes a random MLX checkpoint of the shape once (4.5 GB for the 8B) and reads it from a warm page cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from specfast.bench.random_model import Maker
from specfast.bench.shapes import SHAPES, Shape, find_shape
from specfast.safetensors_file import TensorView, write_safetensors

LIMIT_MB, LIMIT_SECONDS = 300, 3.0
MAX_CONTEXT, SPARE_POSITIONS = 8192, 32

# What the measured process does; it prints one line of JSON.
CHILD = """
import json, sys, time
from pathlib import Path
import numpy as np
directory, context, pack = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "packed"
start = time.perf_counter()
from specfast import _core
from specfast.checkpoint import load_model
imported = time.perf_counter()
model = load_model(directory, pack=pack).model
loaded = time.perf_counter()
cache = _core.Cache(model, context + int(sys.argv[4]))
model.prefill(cache, np.arange(context, dtype=np.int32))
proposal = _core.Proposal()
proposal.set_tokens(np.arange(5, dtype=np.int32))
model.verify(cache, np.array([1], np.int32), proposal, _core.Law(temperature=0.0), 1.0, 0, 0)
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(json.dumps({
    "import_s": imported - start, "load_s": loaded - imported, "peak_mb": int(status["VmHWM"].split()[0]) / 1e3 * 1.024,
    "anonymous_mb": int(status["RssAnon"].split()[0]) / 1e3 * 1.024,
    "weights_mb": model.weight_bytes / 1e6, "kv_mb": cache.nbytes / 1e6,
}))
"""


def write_checkpoint(shape: Shape, quant: str, directory: Path) -> None:
    """config.json and a shard of random weights per layer, in MLX's names and layout."""
    directory.mkdir(parents=True, exist_ok=True)
    bits, group = int(quant[1]), int(quant.partition("g")[2])
    make, weight_map = Maker(quant, 0), {}

    def matrix(name: str, N: int, K: int) -> dict[str, TensorView]:
        kinds = (("weight", "U32", K * bits // 32), ("scales", "BF16", K // group), ("biases", "BF16", K // group))
        return {
            f"{name}.{kind}": TensorView(dtype, (N, columns), data)
            for (kind, dtype, columns), data in zip(kinds, make.quantised(N, K), strict=True)
        }

    def norm(name: str) -> dict[str, TensorView]:
        return {f"{name}.weight": TensorView("F32", (shape.hidden,), np.ones(shape.hidden, np.float32).view(np.uint8))}

    def write(shard: str, tensors: dict[str, TensorView]) -> None:
        write_safetensors(directory / shard, tensors)
        weight_map.update(dict.fromkeys(tensors, shard))
        print(f"wrote {shard}", file=sys.stderr, flush=True)

    q, kv, hidden = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, shape.hidden
    sizes = {
        "self_attn.q_proj": (q, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q), "mlp.gate_proj": (shape.intermediate, hidden),
        "mlp.up_proj": (shape.intermediate, hidden), "mlp.down_proj": (hidden, shape.intermediate),
    }  # fmt: skip
    for index in range(shape.layers):
        at = f"model.layers.{index}"
        layer = norm(f"{at}.input_layernorm") | norm(f"{at}.post_attention_layernorm")
        for name, size in sizes.items():
            layer |= matrix(f"{at}.{name}", *size)
        write(f"layer-{index:02}.safetensors", layer)
    write("ends.safetensors", norm("model.norm") | matrix("model.embed_tokens", shape.vocab, hidden))
    if not shape.tied:
        write("head.safetensors", matrix("lm_head", shape.vocab, hidden))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = {
        "model_type": "llama", "hidden_size": shape.hidden, "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "head_dim": shape.head_dim,
        "intermediate_size": shape.intermediate, "vocab_size": shape.vocab, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "max_position_embeddings": MAX_CONTEXT, "tie_word_embeddings": shape.tied, "quantization": {"bits": bits, "group_size": group},
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))


def whole(low: int, high: int) -> Callable[[str], int]:
    """Parses a whole number in low to high."""

    def parse(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number in {low} to {high}")
        return int(text)

    return parse


def measure(directory: Path, context: int, layout: str) -> dict[str, float]:
    """Figures of one process.

    Raises:
        SystemExit: it failed; with what it said.
    """
    command = [sys.executable, "-c", CHILD, str(directory), str(context), layout, str(SPARE_POSITIONS)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip() or "it said nothing; memory may have run out"
        raise SystemExit(f"{directory}, {layout}: the measured process ended with {done.returncode}:\n{said}")
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3.1-8b", choices=[s.name for s in SHAPES.values() if not s.qkv_bias])
    parser.add_argument("--quant", default="q4g64", choices=["q4g32", "q4g64", "q4g128", "q8g64"])
    longest = MAX_CONTEXT - SPARE_POSITIONS
    parser.add_argument(
        "--context", type=whole(1, longest), default=512, metavar="N", help=f"prompt tokens, 1 to {longest} (512)"
    )
    parser.add_argument(
        "--repeats",
        type=whole(1, 100),
        default=3,
        metavar="N",
        help="processes a layout, of which the median counts (3)",
    )
    parser.add_argument("--cache", type=Path, default=Path("build/memory"), help="where the checkpoint is kept")
    parser.add_argument("--json", action="store_true", help="print a JSON object a layout")
    options = parser.parse_args(arguments)
    directory = options.cache / f"{options.shape}-{options.quant}"
    if not (directory / "config.json").is_file():
        write_checkpoint(find_shape(options.shape), options.quant, directory)
    for file in directory.glob("*.safetensors"):  # into the page cache
        np.fromfile(file, dtype=np.uint8).max()
    over = 0
    for layout in ("in place", "packed"):
        runs = []
        for _ in range(options.repeats):
            runs.append(measure(directory, options.context, layout))
            time.sleep(1)
        best = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        limit = best["weights_mb"] + best["kv_mb"] + LIMIT_MB
        over += best["peak_mb"] > limit or best["load_s"] > LIMIT_SECONDS
        if options.json:
            print(json.dumps({"layout": layout, "limit_mb": limit, **best}))
        else:
            print(
                f"{options.shape} {options.quant} {layout}: loaded in {best['load_s']:.2f} s (limit {LIMIT_SECONDS:g}); peak "
                f"{best['peak_mb']:.0f} MB, of them {best['anonymous_mb']:.0f} not file pages; weights {best['weights_mb']:.0f} + KV "
                f"{best['kv_mb']:.0f} + {LIMIT_MB} = {limit:.0f} MB"
            )
    return min(over, 1)


if __name__ == "__main__":
    sys.exit(main())
