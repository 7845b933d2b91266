"""Writes a trained checkpoint as a Hugging Face model directory: config.json, model.safetensors (bf16), tokenizer."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from model import SHAPES
from safetensors.torch import save_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="what train.py or distill.py wrote")
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--data", type=Path, required=True, help="the folder corpus.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="directory to create")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True)
    state = torch.load(arguments.checkpoint, weights_only=True)
    tensors = {f"model.{name}": tensor.to(torch.bfloat16).contiguous() for name, tensor in state.items()}
    save_file(tensors, arguments.out / "model.safetensors", metadata={"format": "pt"})
    config = SHAPES[arguments.shape].config()
    (arguments.out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {"bos_token_id": 0, "eos_token_id": 1}
    (arguments.out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|bos|>", "eos_token": "<|eos|>"}
    (arguments.out / "tokenizer_config.json").write_text(json.dumps(tokenizer, indent=2) + "\n")
    shutil.copy2(arguments.data / "tokenizer.json", arguments.out / "tokenizer.json")


if __name__ == "__main__":
    main()
