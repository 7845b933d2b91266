"""The corpus: Python's standard library without its tests, a byte-level BPE tokenizer for it, and the held-out files."""

from __future__ import annotations

import argparse
import hashlib
import json
import sysconfig
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BOS, EOS = "<|bos|>", "<|eos|>"
VOCAB = 4096
HELD_OUT_PERCENT = 3
SKIPPED_DIRECTORIES = {"test", "tests", "idle_test", "site-packages", "__pycache__", "dist-packages"}


def source_files(library: Path) -> list[Path]:
    """Standard library sources, relative to `library`, in a fixed order."""
    files = (path.relative_to(library) for path in library.rglob("*.py"))
    return sorted(path for path in files if not SKIPPED_DIRECTORIES & set(path.parts))


def is_held_out(path: Path) -> bool:
    """Whether a file is never trained on: decided by a hash of its path alone."""
    return int(hashlib.sha256(path.as_posix().encode()).hexdigest(), 16) % 100 < HELD_OUT_PERCENT


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """A byte-level BPE tokenizer that starts every document with BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=[BOS, EOS], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for tokenizer.json, train.npy and heldout.npy")
    parser.add_argument("--library", type=Path, default=Path(sysconfig.get_paths()["stdlib"]))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)

    files = source_files(arguments.library)
    texts = {path: (arguments.library / path).read_text(encoding="utf-8", errors="replace") for path in files}
    held_out = [path for path in files if is_held_out(path)]
    training = [path for path in files if not is_held_out(path)]
    tokenizer = train_tokenizer([texts[path] for path in training])
    tokenizer.save(str(arguments.out / "tokenizer.json"))
    eos = tokenizer.token_to_id(EOS)
    sizes = {}
    for name, paths in (("train", training), ("heldout", held_out)):
        ids = [token for path in paths for token in [*tokenizer.encode(texts[path]).ids, eos]]
        np.save(arguments.out / f"{name}.npy", np.asarray(ids, dtype=np.uint16))
        sizes[name] = {
            "files": len(paths),
            "tokens": len(ids),
            "bytes": sum(len(texts[p].encode()) for p in paths),
        }
    (arguments.out / "heldout.txt").write_text("".join(f"{path.as_posix()}\n" for path in held_out))
    (arguments.out / "corpus.json").write_text(json.dumps(sizes, indent=1) + "\n")
    print(json.dumps(sizes))


if __name__ == "__main__":
    main()
