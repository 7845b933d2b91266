"""Tokens per target pass of a pair on held-out Python, and the held-out loss, with the engine that users run."""

from __future__ import annotations

import argparse
import json
import sysconfig
from collections import Counter
from pathlib import Path

import numpy as np
import specfast
from specfast import _core
from specfast.checkpoint import load_model
from specfast.tokenizer import Tokenizer


def prompts(library: Path, names: list[str], tokenizer: Tokenizer, per_file: int, length: int) -> list[list[int]]:
    """Windows of held-out files, each starting at the file's beginning or at a later line, with the start token."""
    found = []
    for name in names:
        tokens = tokenizer.encode((library / name).read_text(encoding="utf-8", errors="replace"))
        starts = np.linspace(1, max(1, len(tokens) - length), per_file).astype(int)
        found += [[tokens[0], *tokens[s : s + length]] for s in sorted(set(starts.tolist())) if len(tokens) > length]
    return found


def repeats(tokens: list[int], n: int = 16) -> bool:
    """Whether some run of n tokens occurs twice."""
    return max(Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)).values(), default=0) > 1


def log_laws(model: _core.Model, window: np.ndarray) -> np.ndarray:
    """Log-probabilities (len(window), V) float64 after every token of a window."""
    logits = model.forward(_core.Cache(model), window, len(window)).astype(np.float64)
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


def held_out_loss(directory: Path, texts: list[list[int]]) -> dict[str, tuple[float, float, int]]:
    """For every precision: mean nats per token, mean KL divergence from float32 activations, tokens; windows of 512."""
    kinds = (("f32", 16), ("f32", 8), ("bf16", 16), ("int8", 16), ("int8", 8))
    loaded = [load_model(directory, precision=precision, kv_bits=kv_bits) for precision, kv_bits in kinds]
    models = {model.precision: model.model for model in loaded}
    loss, divergence, count = dict.fromkeys(models, 0.0), dict.fromkeys(models, 0.0), 0
    for text in texts:
        for first in range(0, len(text) - 1, 512):
            window = np.asarray(text[first : first + 513], dtype=np.int32)
            exact = log_laws(models["f32"], window[:-1])
            for precision, model in models.items():
                log_p = exact if precision == "f32" else log_laws(model, window[:-1])
                loss[precision] -= log_p[np.arange(len(window) - 1), window[1:]].sum()
                divergence[precision] += (np.exp(exact) * (exact - log_p)).sum()
            count += len(window) - 1
    return {precision: (loss[precision] / count, divergence[precision] / count, count) for precision in models}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default=None, help="directory (default: the embedded target)")
    parser.add_argument("--draft", default=None, help="directory (default: the embedded draft)")
    parser.add_argument(
        "--held-out", type=Path, default=Path(__file__).parent / "heldout.txt", help="list corpus.py wrote"
    )
    parser.add_argument("--library", type=Path, default=Path(sysconfig.get_paths()["stdlib"]))
    parser.add_argument("--per-file", type=int, default=8, help="prompts per held-out file")
    parser.add_argument("--tokens", type=int, default=128, help="tokens per continuation")
    parser.add_argument("--gamma", type=int, default=5)
    parser.add_argument("--loss", action="store_true", help="also loss and divergence on held-out text, by precision")
    arguments = parser.parse_args()
    target = Path(arguments.target) if arguments.target else specfast.embedded.path("target")
    draft = Path(arguments.draft) if arguments.draft else specfast.embedded.path("draft")
    tokenizer = Tokenizer(target)
    names = arguments.held_out.read_text().split()
    starts = prompts(arguments.library, names, tokenizer, arguments.per_file, 64)
    engine = specfast.load(str(target), str(draft), gamma=arguments.gamma)
    for temperature in (0.0, 1.0):
        kept, passes, tokens, drafted, accepted = 0, 0, 0, 0, 0
        for number, prompt in enumerate(starts):
            result = engine.generate(prompt, max_tokens=arguments.tokens, temperature=temperature, seed=number)
            if repeats(result.token_ids):
                continue
            kept += 1
            passes += result.stats.target_passes
            tokens += result.stats.tokens
            drafted += result.stats.drafted
            accepted += result.stats.accepted
        figures = {
            "temperature": temperature,
            "prompts": len(starts),
            "counted": kept,
            "tokens_per_target_pass": round(tokens / max(passes, 1), 3),
            "acceptance": round(accepted / max(drafted, 1), 3),
        }
        print(json.dumps(figures), flush=True)
    if arguments.loss:
        library_texts = [(arguments.library / name).read_text(encoding="utf-8", errors="replace") for name in names]
        texts = [tokenizer.encode(text) for text in library_texts]
        size = sum(len(text.encode()) for text in library_texts)
        for role, directory in (("target", target), ("draft", draft)):
            for precision, (loss, divergence, count) in held_out_loss(directory, texts).items():
                figures = {
                    "model": role,
                    "precision": precision,
                    "nats_per_token": round(loss, 4),
                    "bits_per_byte": round(loss * count / size / np.log(2), 4),
                    "kl_from_f32": float(f"{divergence:.3g}"),
                }
                print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
