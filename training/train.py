"""Trains a model of the pair on the corpus for a number of minutes: Muon for the matrices, AdamW for the rest."""

from __future__ import annotations

import argparse
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from model import SHAPES, Llama
from torch import Tensor


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal by five Newton-Schulz steps (Jordan et al. 2024)."""

    def __init__(self, parameters: list[Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                buffer = state.setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonal(p.grad.lerp(buffer, group["momentum"]))
                p.mul_(1 - group["lr"] * 0.05)
                p.add_(update, alpha=-group["lr"] * max(1.0, p.shape[0] / p.shape[1]) ** 0.5)


def orthogonal(gradient: Tensor) -> Tensor:
    """The nearest orthogonal matrix, roughly: a quintic iteration on the singular values."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = gradient / (gradient.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.T
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


def batch(data: Tensor, rows: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    starts = torch.randint(len(data) - length - 1, (rows,), generator=generator)
    window = torch.stack([data[s : s + length + 1] for s in starts.tolist()]).long()
    return window[:, :-1], window[:, 1:]


@torch.no_grad()
def held_out_loss(model: Llama, data: Tensor, length: int = 512, rows: int = 64) -> float:
    """Mean loss in nats per token over evenly spaced held-out windows."""
    starts = torch.linspace(0, len(data) - length - 2, rows).long().tolist()
    total = 0.0
    for i in range(0, rows, 8):
        window = torch.stack([data[s : s + length + 1] for s in starts[i : i + 8]]).long()
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(window[:, :-1])
        total += F.cross_entropy(logits.float().flatten(0, 1), window[:, 1:].flatten()).item()
    return total / (rows / 8)


def learning_rate(progress: float) -> float:
    """Warm-up, plateau, and a linear decay over the last 45 percent."""
    return min(1.0, progress / 0.01, (1.0 - progress) / 0.45 + 1e-3)


def make_optimizers(model: Llama, muon_lr: float, adam_lr: float) -> list[torch.optim.Optimizer]:
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [Muon(matrices, lr=muon_lr), torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.95), weight_decay=0.0)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="the folder corpus.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint to write, e.g. target.pt")
    parser.add_argument("--shape", choices=SHAPES, default="target")
    parser.add_argument("--minutes", type=float, default=75.0, help="wall-clock budget; the schedule follows it")
    parser.add_argument("--rows", type=int, default=8, help="sequences per step")
    parser.add_argument("--length", type=int, default=512, help="tokens per sequence")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    data = torch.from_numpy(np.load(arguments.data / "train.npy").astype(np.int32))
    held_out = torch.from_numpy(np.load(arguments.data / "heldout.npy").astype(np.int32))
    model = Llama(SHAPES[arguments.shape])
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(data):,} tokens", flush=True)
    optimizers = make_optimizers(model, muon_lr=0.02, adam_lr=3e-3)
    base = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]

    start, step, seen, saved, average = time.time(), 0, 0, 0.0, math.nan
    while (progress := (time.time() - start) / (60 * arguments.minutes)) < 1.0:
        tokens, wanted = batch(data, arguments.rows, arguments.length, generator)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(tokens)
        loss = F.cross_entropy(logits.float().flatten(0, 1), wanted.flatten())
        loss.backward()
        for optimizer, rates in zip(optimizers, base, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * learning_rate(progress)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step, seen = step + 1, seen + tokens.numel()
        average = loss.item() if math.isnan(average) else 0.98 * average + 0.02 * loss.item()
        if step % 20 == 0:
            print(f"step {step} progress {progress:.3f} tokens {seen:,} loss {average:.3f}", flush=True)
        if time.time() - saved > 300:
            saved = time.time()
            torch.save(model.state_dict(), arguments.out)
            if step > 1:
                print(f"held-out loss {held_out_loss(model, held_out):.4f}", flush=True)
    torch.save(model.state_dict(), arguments.out)
    print(f"steps {step} tokens {seen:,} held-out loss {held_out_loss(model, held_out, rows=128):.4f}", flush=True)


if __name__ == "__main__":
    main()
