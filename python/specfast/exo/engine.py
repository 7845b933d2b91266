"""The inference engine that exo calls: its whole contract, on top of specfast.Engine."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from ..config import ResolvedConfig
from ..errors import ConfigurationError, SpecfastError
from .contract import CLASS_NAME
from .hosts import host_of, typed_engine
from .models import model_cards, register_models
from .options import unknown_model, without_engines
from .requests import CALLER, MOST_CACHED, Caller, Request, Requests
from .ring import Ring
from .serving import ServedModel, ServedModels, is_whole, say
from .wire import Asked


class SpeculativeEngine:
    """exo's engine contract. The class that exo sees, SpeculativeInferenceEngine, is made of this and exo's base class.

    Models are loaded when asked for. Everything that computes runs in one thread, request by request in turn, so that
    exo's event loop stays free. One model is kept besides those in use.

    Args:
        shard_downloader: exo's.
        resolved: the configuration; without a target model, whatever is asked for is the target.
        host_engine: builds exo's own engine by name.
        max_tokens: most tokens of a request; None is the context.

    Attributes:
        emits_many: whether exo's node takes several tokens a step (set by the node's patch); else one at a time.
        shard, tokenizer: of the model asked for last, as exo's own engines have them.
        ring: this node's part in rings, once it has a node.
    """

    emits_many = False

    def __init__(
        self,
        shard_downloader: Any,
        resolved: ResolvedConfig,
        *,
        host_engine: Callable[[str], Any],
        max_tokens: int | None = None,
    ) -> None:
        without_engines(resolved).config.require_available()
        self.shard: Any = None
        self.tokenizer: Any = None
        self.session: dict[str, Any] = {}
        self.ring: Ring | None = None
        self.shard_downloader = shard_downloader
        self.resolved = resolved
        self._max_tokens = max_tokens
        self._models = ServedModels(shard_downloader, host_engine, self._compute)
        self._host_requests: set[str] = set()
        self._requests = Requests(self._ended)
        self._admission = asyncio.Semaphore(MOST_CACHED)  # with one token a step exo does not say when a request ends
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="specfast")
        self._leading = ThreadPoolExecutor(MOST_CACHED, thread_name_prefix="specfast-ring")  # each waits for its laps
        register_models(resolved.config.target_engine)
        say(self.describe())

    def describe(self) -> str:
        """The start-up line: every effective value and where it came from."""
        config = self.resolved.config
        target, draft = host_of(self.resolved, "target"), host_of(self.resolved, "draft")
        engine = target
        if target == "native" and config.target_engine not in (None, "native"):
            engine = f"native, from {config.target_engine}'s checkpoints"
        checkpoints = config.draft_engine not in (None, "native", config.target_engine)
        if draft != target or checkpoints:
            engine += f", drafts {draft}" + (f" from {config.draft_engine}'s" if checkpoints else "")
        automatic = "by auto-config" if config.auto_config and not config.disabled else "none"
        unset = "combined with a draft, else suffix"
        if config.early_exit is not None and not config.disabled:
            automatic, unset = f"early exit {config.early_exit}", "early-exit"
        by_family = [name for name, source in self.resolved.sources.items() if source == "family"]
        values: dict[str, object] = {} if config.target_model else dict.fromkeys(by_family, "the model's")
        if config.target_model and "gamma" in by_family:
            values["gamma"] = f"auto, at most {config.gamma}"
        return self.resolved.describe(
            **values,
            target_model=config.target_model or "the model asked for",
            draft_model=config.draft_model or automatic,
            drafter="none" if config.disabled else config.drafter or unset,
            target_engine=engine,
            rule=config.effective_rule,
        )

    # What exo's base class declares.

    async def encode(self, shard: Any, prompt: str) -> npt.NDArray[np.int64]:
        """Token ids of a prompt, by exo's tokenizer of the model."""
        served = await self._serve(shard)
        return np.asarray(await self._compute(served.tokenizer.encode, prompt), dtype=np.int64)

    async def decode(self, shard: Any, tokens: Any) -> str:
        """Text of tokens, by exo's tokenizer of the model."""
        served = await self._serve(shard)
        return str(await self._compute(served.tokenizer.decode, tokens))

    async def sample(self, x: Any, temp: float = 0.0, **options: Any) -> Any:
        """Tokens are sampled already when they get here; logits are those of exo's own engine, at this one's temperature."""
        if np.issubdtype(np.asarray(x).dtype, np.integer):
            return np.asarray(x).reshape(-1)[-1:]
        asked = (CALLER.get() or Caller()).options
        return await self._models.host.sample(
            x, temp=asked.get("temperature", self.resolved.config.temperature), **options
        )

    async def infer_tensor(
        self, request_id: str, shard: Any, input_data: Any, inference_state: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any] | None]:
        """A prompt's (1, L) token ids, or the tokens of the step before, become the next (1, n) int64 token ids.

        Where exo's own engine runs the model, its result: logits or hidden states.

        Raises:
            SpecfastError: what `Engine.stream` raises.
        """
        if self._requests.get(request_id) is None:
            asked = Asked.from_state(inference_state)
            served = await self._serve(shard)
            if served.host is not None:
                self._host_requests.add(request_id)
                state = inference_state if asked is None else None  # exo's own engines know no foreign state
                return tuple(await served.host.infer_tensor(request_id, shard, input_data, state))
            if self.emits_many:
                await self._admission.acquire()
            self._begin(request_id, served, np.asarray(input_data).reshape(-1).tolist(), asked)
        tokens = await self.step(request_id)
        return np.array([tokens], dtype=np.int64), inference_state

    async def load_checkpoint(self, shard: Any, path: str) -> None:
        """Refused: weights are read from the model's directory only."""
        raise _no_training("load_checkpoint")

    async def train(self, *arguments: Any, **options: Any) -> Any:
        """Refused: this engine generates."""
        raise _no_training("train")

    async def evaluate(self, *arguments: Any, **options: Any) -> Any:
        """Refused: this engine generates."""
        raise _no_training("eval")

    async def clear_session(self) -> None:
        """Forgets what was saved in the session."""
        self.session.clear()

    # What exo's node and command line call besides.

    async def ensure_shard(self, shard: Any) -> None:
        """Loads a model, its draft with it, unless it is there. Layers that another node's laps will ask for are only fetched.

        exo calls this ahead of requests, and nobody looks at what goes wrong: the request itself says it.
        """
        with contextlib.suppress(SpecfastError):
            follows = self.ring is not None and self.emits_many and not shard.is_first_layer()
            if follows and self.ring and await self.ring.join(shard):
                await self.shard_downloader.ensure_shard(shard, CLASS_NAME)
            else:
                await self._serve(shard)

    async def cleanup(self) -> None:
        """Ends all requests and the thread they run in."""
        self.cancel_all()
        self._executor.shutdown(wait=True)
        self._leading.shutdown(wait=True)

    # Requests.

    def caller(self, request_id: str) -> Caller:
        """Who asked for a request under way."""
        request = self._requests.get(request_id)
        return request.caller if request else Caller()

    def owns(self, request_id: str) -> bool:
        """Whether a request is under way natively."""
        return self._requests.get(request_id) is not None

    async def step(self, request_id: str) -> list[int]:
        """The next tokens of a request; none when it was cancelled."""
        request = self._requests.get(request_id)
        if request is None:
            raise ConfigurationError(f"request {request_id} is not under way; send its prompt again")
        executor = self._executor if request.engine.layers is None else self._leading
        running = executor.submit(self._step, request)
        try:
            tokens = await asyncio.wrap_future(running)
        except asyncio.CancelledError:  # nobody will ask for another step
            request.cancel()
            end = partial(asyncio.get_running_loop().call_soon_threadsafe, self._requests.end, request_id)
            running.add_done_callback(lambda _: end())
            raise
        except Exception as error:
            request.caller.error = error
            self._requests.end(request_id)
            raise
        request.caller.begun = True
        if request.caller.gone:
            tokens = [] if self.emits_many else [request.eos]  # nobody to give them to
        over = request.given >= (self._max_tokens or request.given + 1) or not tokens or tokens[-1] == request.eos
        if request.caller.gone or over or (request.finished and self.emits_many):
            self._requests.end(request_id)
        return tokens

    def cancel(self, request_id: str) -> None:
        """Ends a request: nobody waits for it any more."""
        self._requests.cancel(request_id)

    def end(self, request_id: str) -> None:
        """Lets a request go that has all it may have."""
        self._requests.end(request_id)

    def cancel_all(self) -> None:
        """Ends all requests."""
        for request in self._requests.all():
            request.cancel()

    def _begin(self, request_id: str, served: ServedModel, prompt: list[int], asked: Asked | None) -> None:
        caller = CALLER.get() or Caller(asked.options if asked else {}, watched=asked is not None)
        caller.request_id = request_id
        engine = served.engine
        assert engine is not None
        self._requests.add(
            Request(
                request_id,
                served.shard.model_id,
                engine,
                prompt,
                self._max_tokens or engine.max_context,
                caller,
                singly=not self.emits_many,
                eos=served.tokenizer.eos_token_id,
            )
        )

    def _ended(self, request: Request) -> None:
        self._models.count(request)
        if self.ring:
            self.ring.tell_ended(request.id, request.caller.error)
        if self.emits_many:
            self._admission.release()

    def _step(self, request: Request) -> list[int]:
        tokens = request.step()
        self._requests.make_room()
        return tokens

    # Models.

    def set_models(self, target: str | None, draft: str | None = None) -> None:
        """Changes target and draft, for requests from now on; those under way keep theirs.

        Raises:
            ConfigurationError: a model nobody knows.
        """
        if wrong := unknown_model(model_cards(), target, draft):
            raise ConfigurationError(wrong)
        self.resolved = self.resolved.with_models(target, draft)
        self._models.clear()
        if self.ring:
            self.ring.known.choose(target, draft)

    async def _serve(self, shard: Any) -> ServedModel:
        resolved, make_target = self.resolved, None
        leads = self.ring is not None and self.emits_many and shard.is_first_layer() and not is_whole(shard)
        if leads and self.ring and (plan := await self.ring.join(shard)):
            try:
                resolved = self.ring.settings(plan)
                make_target = self.ring.make_target(shard, typed_engine(resolved, "target"))
            except ConfigurationError as error:
                (CALLER.get() or Caller()).error = error
                raise
        in_use = {request.model for request in self._requests.all()}
        served = await self._models.serve(shard, resolved, in_use, make_target)
        self.shard, self.tokenizer = shard, served.tokenizer
        return served

    def get_speculation_stats(self) -> dict[str, Any]:
        """Counters and rates since the engine was built; works before any model is loaded.

        Returns:
            What `specfast.Engine.get_speculation_stats` returns, for the target; the counters are of all models. And
            host_requests (decoded by exo's own engine), under_way, fallback (why the target is decoded plainly by exo's
            own engine, or None), and models: by id the draft, compatibility and acceptance of each that is loaded.
        """
        config = self.resolved.config
        name = config.target_model or (self.shard.model_id if self.shard else None)
        served = self._models.get(name)
        native = served.engine if served else None
        pair = native.pair if native else None
        config = native.config if native else config
        return {
            "model_family_compatibility": served.compatibility if served else "unknown",
            "lossless": config.lossless or (native is not None and native.drafter == "none"),
            "lenience": config.lenience,
            "precision": native.precision if native else "unknown",
            "target_model": name,
            "draft_model": (pair.draft_name if pair else config.draft_model),
            "fallback": served.why_plain if served else None,
            "host_requests": len(self._host_requests),
            "under_way": len(self._requests),
            "models": self._models.describe(),
            **self._models.total().as_dict(),
        }

    async def _compute(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await _within(self._executor, function, *arguments)

    def join_rings(self, node: Any) -> None:
        """Takes part in the rings of a node of exo's, whose engine this is."""
        self.ring = Ring(node, lambda: self.resolved, self._compute, self._models.say_once)


async def _within(executor: Executor, function: Callable[..., Any], *arguments: Any) -> Any:
    return await asyncio.get_running_loop().run_in_executor(executor, partial(function, *arguments))


def _no_training(what: str) -> ConfigurationError:
    return ConfigurationError(f"{what} is not for the speculative engine; use --inference-engine mlx or tinygrad")
