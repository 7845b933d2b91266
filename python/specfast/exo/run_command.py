"""`exo run MODEL --prompt P`, with `--time` for every engine, and for the speculative one with all tokens of a step."""

from __future__ import annotations

import asyncio
import sys
import time
import uuid
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from ..errors import ConfigurationError
from .engine import SpeculativeEngine
from .options import command_line
from .requests import CALLER, Caller

PATIENCE_SECONDS = 300.0


@dataclass
class Answer:
    """Tokens as they arrive, and when."""

    tokens: list[int] = field(default_factory=list)
    first: int = 0
    first_at: float = 0.0
    last_at: float = 0.0
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def take(self, tokens: list[int], finished: bool) -> None:
        """Tokens that arrived now."""
        self.last_at = time.perf_counter()
        if not self.tokens:
            self.first, self.first_at = len(tokens), self.last_at
        self.tokens.extend(tokens)
        if finished:
            self.ended.set()

    async def wait(self) -> None:
        """Until the end.

        Raises:
            TimeoutError: nothing came for PATIENCE_SECONDS.
        """
        while not self.ended.is_set():
            seen = len(self.tokens)
            try:
                await asyncio.wait_for(self.ended.wait(), PATIENCE_SECONDS)
            except TimeoutError:
                if len(self.tokens) == seen:
                    raise TimeoutError(f"no token came for {PATIENCE_SECONDS:.0f} s") from None

    def figures(self, started: float, prompt_tokens: int) -> str:
        """What `--time` prints."""
        seconds, rest = self.first_at - started, self.last_at - self.first_at
        speed = f"{(len(self.tokens) - self.first) / rest:.1f} tok/s" if rest > 0 else "too short for a rate"
        return (
            f"prompt: {prompt_tokens} tokens, {prompt_tokens / seconds:.1f} tok/s\n"
            f"first token: {seconds:.3f} s\n"
            f"generation: {len(self.tokens)} tokens, {speed}"
        )


def replace_run_command(module: Any) -> None:
    """exo's own `run` stays where it can; it shows the first step's tokens twice and may lose steps of several tokens."""
    original = module.run_model_cli

    async def run_model_cli(node: Any, model_name: str, prompt: str) -> None:
        if isinstance(node.inference_engine, SpeculativeEngine) or command_line().time:
            await run(module, node, model_name, prompt, timed=command_line().time)
        else:
            await original(node, model_name, prompt)

    module.run_model_cli = run_model_cli


async def run(main: ModuleType, node: Any, model: str, prompt: str, *, timed: bool) -> None:
    """Answers one prompt on the command line; exits with status 1, and says why, when that fails."""
    try:
        await _answer(main, node, model, prompt, timed=timed)
    except Exception as error:
        print(f"Error: {str(error) or type(error).__name__}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None


async def _answer(main: ModuleType, node: Any, model: str, prompt: str, *, timed: bool) -> None:
    engine_class = type(node.inference_engine).__name__
    shard = main.build_base_shard(model, engine_class)
    if shard is None:
        raise ConfigurationError(f"exo has no model {model!r} for {engine_class}")
    tokenizer = await main.resolve_tokenizer(main.get_repo(shard.model_id, engine_class))
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    if viz := getattr(main, "topology_viz", None):
        viz.update_prompt(model, prompt)
    loading = time.perf_counter()
    if timed:
        await node.inference_engine.ensure_shard(node.get_current_shard(shard))
    request_id, answer, caller, started = str(uuid.uuid4()), Answer(), Caller(), time.perf_counter()
    CALLER.set(caller)
    callback = node.on_token.register(f"specfast-run-{request_id}")
    callback.on_next(lambda who, tokens, finished: answer.take(tokens, finished) if who == request_id else None)
    print(f"Processing prompt: {text}")
    try:
        await node.process_prompt(shard, text, request_id=request_id)
        await answer.wait()
    finally:
        node.on_token.deregister(f"specfast-run-{request_id}")
    print("\nGenerated response:")
    print(tokenizer.decode(answer.tokens))
    if timed:
        print(f"\nload: {started - loading:.2f} s\n{answer.figures(started, len(tokenizer.encode(text)))}")
        if isinstance(node.inference_engine, SpeculativeEngine):
            stats = node.inference_engine.get_speculation_stats()
            if stats["target_passes"]:  # else another node of the ring led the request, and has the figures
                print(
                    f"acceptance: {stats['acceptance_rate']:.2f}, {stats['tokens_per_target_pass']:.2f} tokens per target pass"
                )
    if caller.error is not None:
        raise caller.error
