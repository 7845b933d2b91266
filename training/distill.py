"""Distils the draft on the target's laws, over corpus text and over text the target wrote itself."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from model import SHAPES, Llama
from torch import Tensor
from train import batch, learning_rate, make_optimizers


@torch.no_grad()
def write_text(target: Llama, data: Tensor, tokens: int, generator: torch.Generator) -> Tensor:
    """Continuations of corpus prompts by the target, at temperatures 1.0, 0.7 and nearly greedy; one long sequence."""
    rows, length, pieces = 96, 320, []
    torch.manual_seed(1)
    while sum(len(piece) for piece in pieces) < tokens:
        prompt, _ = batch(data, rows, 48, generator)
        caches: list[list[Tensor]] = [[] for _ in target.layers]
        temperature = torch.tensor([1.0, 0.7, 0.1]).repeat_interleave(rows // 3)[:, None]
        text, step = prompt, prompt
        while text.shape[1] < length:
            with torch.autocast("cpu", torch.bfloat16):
                logits = target(step, caches)[:, -1]
            step = torch.multinomial(F.softmax(logits.float() / temperature, -1), 1)
            text = torch.cat([text, step], 1)
        pieces.append(text.flatten())
    return torch.cat(pieces).int()


def distance(p_logits: Tensor, q_logits: Tensor, progress: float) -> tuple[Tensor, Tensor]:
    """The loss and the expected acceptance sum(min(p, q)): divergence first, then 1 - acceptance itself."""
    p, log_q = F.softmax(p_logits.float(), -1), F.log_softmax(q_logits.float(), -1)
    acceptance = torch.minimum(p, log_q.exp()).sum(-1).mean()
    divergence = (p * (p.clamp_min(1e-9).log() - log_q)).sum(-1).mean()
    weight = min(1.0, max(0.0, (progress - 0.3) / 0.3))
    return (1 - 0.9 * weight) * divergence + weight * 2 * (1 - acceptance), acceptance.detach()


@torch.no_grad()
def held_out_acceptance(target: Llama, draft: Llama, data: Tensor) -> float:
    """Expected acceptance over held-out windows at temperature 1."""
    windows = torch.stack([data[s : s + 512] for s in torch.linspace(0, len(data) - 513, 48).long().tolist()]).long()
    with torch.autocast("cpu", torch.bfloat16):
        pairs = [distance(target(w), draft(w), 1.0)[1].item() for w in windows.split(8)]
    return sum(pairs) / len(pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="the folder corpus.py wrote")
    parser.add_argument("--target", type=Path, required=True, help="checkpoint train.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint to write")
    parser.add_argument("--minutes", type=float, default=20.0, help="wall-clock budget; the schedule follows it")
    parser.add_argument("--own-tokens", type=int, default=500_000, help="tokens of the target's own text")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    arguments = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    data = torch.from_numpy(np.load(arguments.data / "train.npy").astype(np.int32))
    held_out = torch.from_numpy(np.load(arguments.data / "heldout.npy").astype(np.int32))
    target, draft = Llama(SHAPES["target"]).eval(), Llama(SHAPES["draft"])
    target.load_state_dict(torch.load(arguments.target, weights_only=True))
    start = time.time()
    own = write_text(target, data, arguments.own_tokens, generator)
    print(f"{len(own):,} tokens written by the target in {time.time() - start:.0f} s", flush=True)
    optimizers = make_optimizers(draft, muon_lr=0.02, adam_lr=4e-3)
    base = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]

    start, step, average = time.time(), 0, 0.5
    while (progress := (time.time() - start) / (60 * arguments.minutes)) < 1.0:
        tokens, _ = batch(own if step % 2 else data, arguments.rows, arguments.length, generator)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                wanted = target(tokens)
            drafted = draft(tokens)
        loss, acceptance = distance(wanted, drafted, progress)
        loss.backward()
        for optimizer, rates in zip(optimizers, base, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * learning_rate(progress)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step, average = step + 1, 0.95 * average + 0.05 * acceptance.item()
        if step % 20 == 0:
            print(f"step {step} progress {progress:.3f} loss {loss.item():.4f} acceptance {average:.4f}", flush=True)
        if step % 200 == 0:
            torch.save(draft.state_dict(), arguments.out)
            print(f"held-out acceptance {held_out_acceptance(target, draft, held_out):.4f}", flush=True)
    torch.save(draft.state_dict(), arguments.out)
    seen = step * arguments.rows * arguments.length
    print(
        f"steps {step} tokens {seen:,} held-out acceptance {held_out_acceptance(target, draft, held_out):.4f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
