"""exo's second generation, whose engine is MLX: a request alone on a single node is decoded speculatively, if asked for.

`SPECFAST_EXO=1`, or one of the `--speculative-*` flags, wraps the engine that exo's builder makes. Prompts, prefix cache,
samplers, stop strings and chunks stay exo's: only the loop that asks the target for one token after another becomes one
that asks for several. Each is drawn by exo's own sampler from the row where plain decoding would draw it, one draw a token,
and drafted tokens are kept as long as they are the ones drawn. The law is therefore the sampler's, whatever it is, and with
a seed the text is that of plain decoding as far as MLX computes several rows like one.

Requests that come together are exo's batch engine's, which shares each pass between them.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import _core, hub
from ..checkpoint import load_model
from ..config import ResolvedConfig, resolve_config
from ..context import Context
from ..controllers import AutoGamma, Controller, FixedGamma
from ..drafters import CombinedDrafter, CopyDrafter, Drafter, FallbackDrafter, ModelDrafter
from ..errors import SpecfastError
from ..measurements import Measurements
from ..models import choose_draft
from ..stats import SpeculationStats
from .detection import SWITCH
from .serving import say
from .v1_target import SampledTarget, can_roll_back, decoded

OPTIONS = "SPECFAST_EXO_OPTIONS"
OWN_SPECULATION = ("EXO_SPECULATIVE", "EXO_DRAFT_MODE")
DRAFT_CONTEXT = 8192

BUILDER: Mapping[str, str] = {
    "MlxBuilder.build": "self",
    "MlxBuilder.load": "self bound_instance",
}
GENERATE: Mapping[str, str] = {
    "mlx_generate": (
        "model tokenizer task prompt kv_prefix_cache group on_prefill_progress distributed_prompt_progress_callback "
        "on_generation_token vision_processor"
    ),
    "encode_prompt": "tokenizer prompt",
    "fix_unmatched_think_end_tokens": "tokens tokenizer",
}
BATCH: Mapping[str, str] = {
    "ExoBatchGenerator.submit": (
        "self task_params prompt on_prefill_progress distributed_prompt_progress_callback on_generation_token"
    ),
    "ExoBatchGenerator.step": "self",
    "ExoBatchGenerator.cancel": "self uids",
    "ExoBatchGenerator.close": "self",
}
"""What is relied on, by module; see `contract`."""
MODULES = {
    "exo.worker.engines.mlx.builder": BUILDER,
    "exo.worker.engines.mlx.generator.generate": GENERATE,
    "exo.worker.engines.mlx.generator.batch_generate": BATCH,
}


def asked_for() -> bool:
    """Whether this process speculates: it was asked to, and exo does not bring its own speculation."""
    if os.environ.get(SWITCH) != "1":
        return False
    own = [name for name in OWN_SPECULATION if os.environ.get(name)]
    if own:
        say(f"exo speculates itself ({own[0]}): specfast leaves it alone; unset {own[0]} or {SWITCH}")
    return not own


def typed_options() -> dict[str, Any]:
    """What was typed on the command line of the process that started this one."""
    return dict(json.loads(os.environ.get(OPTIONS, "{}")))


def speculate(module: Any) -> None:
    """Engines that the builder makes for one node speculate, where that was asked for."""
    original = module.MlxBuilder.build

    def build(self: Any) -> Any:
        engine = original(self)
        if not asked_for():
            return engine
        if why := _why_not(self, engine):
            say(f"{self.model_id} is decoded plainly by exo: {why}")
            return engine
        speculation = Speculation(str(self.model_id), typed_options())
        engine._gen = SpeculativeBatch(engine._gen, speculation, lambda: len(engine._queue))
        return engine

    module.MlxBuilder.build = build


def _why_not(builder: Any, engine: Any) -> str | None:
    """Why an engine is left as it is, if it is."""
    if builder.group is not None:
        return "the model is spread over several nodes, which this version of specfast does not speculate on"
    if not hasattr(engine, "_gen") or not hasattr(engine, "_queue"):
        return "--no-batch is exo's plain sequential engine; leave it out"
    if typed_options().get("disabled"):
        return "--disable-speculative"
    return None


class Speculation:
    """How requests on a model are drafted. The draft is loaded, and fetched if need be, as the model is.

    Args:
        model: exo's id of the target, a repository.
        options: typed, by the names of SpeculativeConfig.
    """

    def __init__(self, model: str, options: Mapping[str, Any]) -> None:
        self.model = model
        self.stats = SpeculationStats()
        typed = {name: value for name, value in options.items() if not name.endswith("_engine")}
        self.resolved: ResolvedConfig = resolve_config({"auto_config": True, **typed, "target_model": model})
        self._measurements = Measurements()
        self._draft: Any = None
        self._load()

    def drafter(self, capacity: int, tokens: int) -> Drafter:
        """Of one request: the text so far is copied, or a draft model drafts its likeliest tokens."""
        name = self.resolved.config.drafter
        suffix = CopyDrafter(name if name == "prompt-lookup" else "suffix")
        if self._draft is None or name in ("suffix", "prompt-lookup"):
            return FallbackDrafter(suffix, self._failed)
        law = _core.Law(temperature=0.0, vocab_limit=min(tokens, self._draft.vocab))
        model = ModelDrafter(self._draft, law, 0, min(capacity, DRAFT_CONTEXT))
        both: Drafter = model if name == "model" else CombinedDrafter({"suffix": suffix, "model": model})
        return FallbackDrafter(both, self._failed)

    def controller(self) -> Controller:
        """A typed gamma is fixed; else measured times decide, down to plain decoding."""
        gamma = self.resolved.config.gamma
        if self.resolved.sources["gamma"] == "typed" and gamma != "auto":
            return FixedGamma(int(gamma))
        return AutoGamma(20 if gamma == "auto" else int(gamma), self._measurements)

    def ended(self, stats: SpeculationStats) -> None:
        """Counts a request, and logs it."""
        self.stats.add(stats)
        say(
            f"{self.model}, {stats.tokens} tokens in {stats.target_passes} target passes "
            f"({stats.tokens_per_target_pass:.2f} a pass), acceptance {stats.acceptance_rate:.2f}"
        )

    def _load(self) -> None:
        try:
            choice = choose_draft(self.resolved.config, models_folder(self.model), say, models_folder)
            if choice.directory:
                self._draft = load_model(choice.directory).model
                say(f"{self.model}: draft {choice.name} ({choice.status}), in specfast's own decoder")
        except SpecfastError as error:
            say(f"{self.model}: no draft model, the text so far is copied instead: {error}")

    @staticmethod
    def _failed(error: Exception) -> None:
        say(f"drafting failed, and plain decoding goes on ({type(error).__name__}: {error})")


def models_folder(name: str, *, metadata_only: bool = False) -> Path:
    """A model's directory: exo's where it has downloaded it, else as `hub.resolve`."""
    utils = importlib.import_module("exo.download.download_utils")
    common = importlib.import_module("exo.shared.types.common")
    repository = hub.repository(name)
    found = utils.build_model_path(common.ModelId(repository)) if repository else None
    return Path(found) if found and Path(found).is_dir() else hub.resolve(name, metadata_only=metadata_only)


class SpeculativeBatch:
    """exo's batch generator, in front of which a request that comes alone is decoded speculatively.

    Args:
        batch: exo's ExoBatchGenerator.
        speculation: of the model.
        waiting: how many requests exo is about to submit after the one it submits.
    """

    def __init__(self, batch: Any, speculation: Speculation, waiting: Callable[[], int]) -> None:
        self._batch, self._speculation, self._waiting = batch, speculation, waiting
        self._requests: dict[int, SpeculativeRequest] = {}
        self._next = -1  # exo's own ids count up from 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batch, name)

    @property
    def has_work(self) -> bool:
        """As exo's."""
        return bool(self._requests) or bool(self._batch.has_work)

    def submit(self, task_params: Any, prompt: str, *callbacks: Any, **named: Any) -> int:
        """As exo's."""
        if self.has_work or self._waiting() or task_params.bench or self._batch.vision_processor is not None:
            return int(self._batch.submit(task_params, prompt, *callbacks, **named))
        uid, self._next = self._next, self._next - 1
        self._requests[uid] = SpeculativeRequest(
            self._batch, self._speculation, task_params, prompt, *callbacks, **named
        )
        try:
            self._requests[uid].prefill()
        except BaseException:
            self._requests.pop(uid).close()
            raise
        return uid

    def step(self) -> list[tuple[int, Any]]:
        """As exo's: all that a round of each request gave."""
        found: list[tuple[int, Any]] = list(self._batch.step()) if self._batch.has_work else []
        for uid, request in list(self._requests.items()):
            responses = request.step()
            found += [(uid, response) for response in responses]
            if not responses or responses[-1].finish_reason is not None:
                self._requests.pop(uid).close()
        return found

    def cancel(self, uids: Sequence[int]) -> None:
        """As exo's."""
        for uid in uids:
            if request := self._requests.pop(uid, None):
                request.close()
        if theirs := [uid for uid in uids if uid >= 0]:
            self._batch.cancel(theirs)

    def close(self) -> None:
        """As exo's."""
        self.cancel(list(self._requests))
        self._batch.close()


class SpeculativeRequest:
    """One request: exo's own generator, with the loop over tokens replaced."""

    def __init__(
        self,
        batch: Any,
        speculation: Speculation,
        task: Any,
        prompt: str,
        on_prefill_progress: Callable[[int, int], None] | None = None,
        distributed_prompt_progress_callback: Callable[[], None] | None = None,
        on_generation_token: Callable[[], None] | None = None,
    ) -> None:
        self._generate: Any = importlib.import_module("exo.worker.engines.mlx.generator.generate")
        self._speculation, self._tokenizer = speculation, batch.tokenizer
        self._greedy = task.temperature == 0
        tokens = self._generate.encode_prompt(batch.tokenizer, prompt)
        tokens = self._generate.fix_unmatched_think_end_tokens(tokens, batch.tokenizer)
        self._prompt: list[int] = [int(token) for token in tokens.tolist()]
        self._context: Context | None = None
        self._left = 0  # tokens of the round that exo has not taken yet
        self._first: list[Any] = []
        self.stats = SpeculationStats(requests=1, prompt_tokens=len(self._prompt))
        self._responses: Iterator[Any] = self._generate.mlx_generate(
            model=batch.model,
            tokenizer=batch.tokenizer,
            task=task,
            prompt=prompt,
            kv_prefix_cache=batch.kv_prefix_cache,
            group=batch.group,
            on_prefill_progress=on_prefill_progress,
            distributed_prompt_progress_callback=distributed_prompt_progress_callback,
            on_generation_token=on_generation_token,
            vision_processor=None,
        )

    def prefill(self) -> None:
        """Reads the prompt, as exo's submit does; the first round's tokens come with it."""
        self._first = self._advance()

    def step(self) -> list[Any]:
        """exo's responses to a round's tokens; none when there is nothing more."""
        first, self._first = self._first, []
        return first or self._advance()

    def close(self) -> None:
        """Ends the request."""
        close = getattr(self._responses, "close", None)
        if close:
            close()
        self._speculation.ended(self.stats)

    def _advance(self) -> list[Any]:
        own = self._generate.stream_generate

        def stream_generate(*arguments: Any, **options: Any) -> Iterator[Any]:
            if options.get("prefill_step_size") != 1:  # exo fills caches with it as well
                return iter(own(*arguments, **options))
            if not can_roll_back(options["prompt_cache"]):
                say("caches of a kind that cannot drop tokens: plain decoding")
                return iter(own(*arguments, **options))
            return self._stream(**options)

        self._generate.stream_generate = stream_generate
        try:
            found = []
            while response := next(self._responses, None):
                found.append(response)
                if self._left == 0 or response.finish_reason is not None:
                    break
            return found
        finally:
            self._generate.stream_generate = own

    def _stream(
        self,
        *,
        model: Any,
        tokenizer: Any,
        prompt: Any,
        prompt_cache: Any,
        max_tokens: int,
        sampler: Any,
        logits_processors: Any = (),
        **_options: Any,
    ) -> Iterator[Any]:
        """What mlx-lm's stream_generate gives, by rounds."""
        capacity = len(self._prompt) + max_tokens + 64
        context = Context(self._prompt, max_tokens, capacity, frozenset(tokenizer.eos_token_ids))
        target = SampledTarget(
            model,
            prompt_cache,
            sampler,
            logits_processors or (),
            len(self._prompt) - len(prompt),
            one_draw=self._greedy,
        )
        drafter = self._speculation.drafter(capacity, len(tokenizer.get_vocab()))
        drafter.prefill(context.tokens[:-1], None)
        controller = self._speculation.controller()
        for response, left in decoded(context, target, drafter, controller, self.stats, tokenizer, len(prompt)):
            self._left = left
            yield response
