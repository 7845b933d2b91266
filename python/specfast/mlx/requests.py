"""A request on mlx-lm models: the target, drafter and controller that its options become."""

from __future__ import annotations

import secrets
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from .. import _core
from ..context import Context
from ..controllers import AutoGamma, Controller, FixedGamma
from ..drafters import CombinedDrafter, CopyDrafter, Drafter, EarlyExitDrafter, ModelDrafter, NoDrafter
from ..early_exit import require_exit
from ..errors import ConfigurationError, UnsupportedModelError
from ..generation import Generation, Terms
from ..sampling import SamplingParams
from ..targets import NativeTarget, Progress
from .accelerate import accelerate, native_model_of, report, require_model
from .cache import KEEP, make_cache
from .host import BoundedDrafter, Draws, HostDrafter, HostTarget
from .options import MOST_DRAFTED, Options
from .sequence import UNBOUNDED, CacheSequence, Quantising


@dataclass
class Request:
    """A request under way.

    Attributes:
        generation: its chunks.
        target: over the host's call, or the native one.
        model: the target's.
        progress: told tokens of the prompt; the generation tells it those before the last one.
        end: called with the tokens given out when the request ends: leaves the caller's caches with exactly these.
        stock_calls_before: calls of the model that had run mlx-lm's layers when the request began.
    """

    generation: Generation
    target: HostTarget | NativeTarget
    model: nn.Module
    progress: Progress | None
    end: Callable[[Sequence[int]], None]
    stock_calls_before: int

    @property
    def path(self) -> str:
        """Whose bits the logits are so far: that of the terms, or "host" once a pass ran in mlx-lm's layers."""
        return self.generation.terms.path if _stock_calls(self.model) == self.stock_calls_before else "host"

    def stats(self) -> dict[str, Any]:
        """What SpeculationStats counts, with path, precision, lossless, rule, drafter, gamma and seed."""
        terms = self.generation.terms
        precision = terms.precision if self.path == terms.path else dtype_name(self.model)
        return {
            "path": self.path,
            "precision": precision,
            **{name: getattr(terms, name) for name in ("lossless", "rule", "drafter", "gamma", "seed")},
            **self.generation.stats.as_dict(),
        }


def begin(
    model: nn.Module,
    draft_model: nn.Module | _core.Model | None,
    tokens: list[int],
    max_tokens: int,
    ends: Collection[int],
    options: Options,
) -> Request:
    """Makes a request; nothing is computed before its first chunk is asked for.

    Where the native decoder knows model and draft and nothing is asked for that it does not do (caches of the caller's,
    logits processors, unknown samplers, log-probabilities) a round is one native call; else the models' own call is used,
    which on an accelerated model is a native one too.

    Args:
        draft_model: mlx-lm's, or a native one.
        tokens: of the prompt, at least one.
        max_tokens: most tokens to generate; -1 for no limit.
        ends: tokens that end the text.

    Raises:
        ConfigurationError, UnsupportedModelError: options that cannot be met.
    """
    require_model("model", model)
    if draft_model is not None and not isinstance(draft_model, _core.Model):
        require_model("draft_model", draft_model)
    plan = _Plan.of(model, draft_model, options)
    capacity = plan.native.max_context if plan.native else UNBOUNDED
    context = Context(tokens, max_tokens if max_tokens >= 0 else capacity, capacity, ends)
    context.whole_rounds = options.seed is not None and plan.draws.rule == "block"
    target, drafter, end = (_own if plan.own else _hosted)(plan, model, draft_model, options)
    controller, gamma = _controller(options, plan)
    rule = plan.draws.rule
    exact = options.lenience <= 1 or rule == "equality" or plan.greedy or plan.drafter == "none"
    terms = Terms(
        seed=plan.draws.seed,
        gamma=gamma,
        drafter=plan.drafter,
        lossless=exact,
        precision=report(model).precision or dtype_name(model),
        rule="greedy" if plan.greedy else rule,
        path=_path(model, plan),
    )
    generation = Generation(
        context,
        target,
        drafter,
        controller,
        progress=_all_but_the_last(options.prompt_progress_callback, len(tokens)),
        terms=terms,
        on_draft_failure=_tell,
    )
    if isinstance(target, HostTarget):
        target.stats = generation.stats
    return Request(generation, target, model, options.prompt_progress_callback, end, _stock_calls(model))


@dataclass(frozen=True)
class _Plan:
    """What was made of the options.

    Attributes:
        native, native_draft: the native models behind those that are accelerated.
        drafter: its name.
        draws: how tokens are drawn.
        vocab: of the target.
        own: whether a round is one native call.
    """

    native: _core.Model | None
    native_draft: _core.Model | None
    drafter: str
    draws: Draws
    vocab: int
    own: bool

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.draws.law is not None and self.draws.law.temperature == 0

    @property
    def drafts(self) -> bool:
        """Whether a draft model drafts."""
        return self.drafter in ("model", "combined")

    @classmethod
    def of(cls, model: nn.Module, draft_model: nn.Module | _core.Model | None, options: Options) -> _Plan:
        """Raises ConfigurationError or UnsupportedModelError for what cannot be."""
        sampling, name = options.sampling(), options.drafter_name(draft_model)
        native = _native(model)
        native_draft = _native(draft_model) if draft_model is not None and name in ("model", "combined") else None
        asked = {
            "prompt_cache": options.prompt_cache is not None,
            "kv_bits": options.kv_bits is not None,
            "logits_processors": bool(options.logits_processors),
            "logprobs": options.logprobs,
            "a sampler whose law is not known": sampling is None,
        }
        hosted = [what for what, is_asked in asked.items() if is_asked]
        if name == "early-exit":
            _require_exit(model, native, options, hosted)
        vocab = native.vocab if native else _vocab(model)
        draws = Draws(
            law=sampling.law(vocab, vocab) if sampling else None,
            sampler=options.sampler,
            processors=tuple(options.logits_processors or ()),
            seed=sampling.seed if sampling else secrets.randbits(53) if options.seed is None else options.seed,
            rule=_rule(options, sampling),
            lenience=options.lenience,
        )
        if sampling is None:
            _say_unknown()
            if options.seed is not None:
                mx.random.seed(options.seed)
        known = native is not None and (native_draft is not None or name not in ("model", "combined"))
        return cls(native, native_draft, name, draws, vocab, known and not hosted)


_Parts = tuple[HostTarget | NativeTarget, Drafter, Callable[[Sequence[int]], None]]


def _own(plan: _Plan, model: nn.Module, draft_model: nn.Module | _core.Model | None, options: Options) -> _Parts:
    """Target and drafter whose rounds are native calls."""
    del model, draft_model
    native, draws = plan.native, plan.draws
    assert native is not None
    assert draws.law is not None
    law, seed, rule, capacity = draws.law, draws.seed, draws.rule, native.max_context
    target = NativeTarget(native, law, draws.lenience, seed, capacity, rule)
    if options.max_kv_size is not None:
        target.cache = make_cache(native, options.max_kv_size, capacity)
    if plan.drafter == "early-exit":
        assert options.early_exit is not None
        gammas = (options.num_draft_tokens,) if options.num_draft_tokens else range(1, MOST_DRAFTED + 1)
        return target, EarlyExitDrafter(target, options.early_exit, gammas=gammas), _leave
    if plan.native_draft is None:
        return target, _copying(plan), _leave
    return target, _combined(plan, ModelDrafter(plan.native_draft, law, seed, capacity, rule)), _leave


def _hosted(plan: _Plan, model: nn.Module, draft_model: nn.Module | _core.Model | None, options: Options) -> _Parts:
    """Target and drafter over the models' own calls, with mlx-lm's caches."""
    quantising = Quantising(options.kv_bits, options.kv_group_size, options.quantized_kv_start)
    given, step = options.prompt_cache, options.prefill_step_size
    fresh = _new_caches(plan, model, options)
    drafts: list[Any] = make_prompt_cache(draft_model) if plan.drafts and isinstance(draft_model, nn.Module) else []
    if given is not None:
        _require_caches(given, len(fresh), len(drafts))
    sequence = CacheSequence(model, fresh if given is None else given[: len(fresh)], quantising)
    target = HostTarget(sequence, plan.draws, step)
    ends, sequences, drafter = [target.end], [sequence], _copying(plan)
    if plan.drafts:
        assert draft_model is not None
        theirs = [] if given is None else given[len(fresh) :]
        law, processors = plan.draws.law, plan.draws.processors
        if plan.native_draft and law and not processors and not theirs:
            draws = law, plan.draws.seed, plan.native_draft.max_context, plan.draws.rule
            model_drafter: Drafter = ModelDrafter(plan.native_draft, *draws)
            drafter = _combined(plan, model_drafter)
        else:
            if isinstance(draft_model, _core.Model):
                raise ConfigurationError(
                    "a native draft model takes no logits_processors, sampler or prompt_cache; give one of mlx-lm's"
                )
            reading = CacheSequence(draft_model, theirs or drafts, quantising)
            host_drafter = HostDrafter(reading, plan.draws, step, plan.vocab)
            drafter = _combined(plan, host_drafter)
            if theirs:
                ends.append(host_drafter.end)
                sequences.append(reading)
    if given is None:
        return target, BoundedDrafter(drafter, sequence), _leave

    def give_back(tokens: Sequence[int]) -> None:
        if any(one.moved for one in sequences):
            return  # they are another request's by now
        for end in ends:
            end(tokens)
        given[: sum(len(one.caches) for one in sequences)] = [cache for one in sequences for cache in one.caches]

    return target, BoundedDrafter(drafter, sequence), give_back


def _leave(tokens: Sequence[int]) -> None:
    """The end where all caches are the request's own."""


def _new_caches(plan: _Plan, model: nn.Module, options: Options) -> list[Any]:
    """mlx-lm's, and rotating ones of max_kv_size also where a model's own method to make them leaves it out."""
    made: list[Any] = make_prompt_cache(model, options.max_kv_size)
    size = options.max_kv_size
    if size is None or plan.native is None:
        return made
    make_cache(plan.native, size)  # refuses what cannot be
    return [RotatingKVCache(size, KEEP) if type(cache) is KVCache else cache for cache in made]


def _copying(plan: _Plan) -> Drafter:
    return CopyDrafter(plan.drafter) if plan.drafter in ("suffix", "prompt-lookup") else NoDrafter()


def _combined(plan: _Plan, drafter: Drafter) -> Drafter:
    both = plan.drafter == "combined"
    return CombinedDrafter({"suffix": CopyDrafter("suffix"), "model": drafter}) if both else drafter


def _rule(options: Options, sampling: SamplingParams | None) -> str:
    if sampling is None:
        return "equality"
    if sampling.temperature == 0 or options.lenience != 1:
        return "token"
    if options.rule is not None:
        return options.rule
    timed = options.num_draft_tokens is None and options.seed is not None  # which must not change a seed's text
    return "coupled" if timed else "block"


def _controller(options: Options, plan: _Plan) -> tuple[Controller, int | Literal["auto"]]:
    if plan.drafter == "none":
        return FixedGamma(0), 0
    timed = options.seed is None or plan.greedy or plan.draws.rule == "coupled"
    if options.num_draft_tokens is None and timed:
        return AutoGamma(MOST_DRAFTED), "auto"
    gamma = options.num_draft_tokens or 5
    return FixedGamma(gamma), gamma


def _path(model: nn.Module, plan: _Plan) -> str:
    """As a report calls it; a round that is one native call is none of MLX's graph."""
    found = report(model).path
    return "native" if plan.own else "host" if found == "stock" else found


def _require_caches(given: Any, layers: int, draft: int) -> None:
    """Checks for caches for the model's layers, followed by none or all of a draft's; without one by any, as in mlx-lm."""
    if not isinstance(given, list) or not all(hasattr(cache, "is_trimmable") for cache in given):
        raise ConfigurationError(f"prompt_cache is {given!r:.100}, but must be a list of caches, of make_prompt_cache")
    counts = {layers, layers + draft}
    if len(given) < layers or (draft and len(given) not in counts):
        wanted = " or ".join(map(str, sorted(counts)))
        raise ConfigurationError(
            f"prompt_cache holds {len(given)} caches, but the model needs {wanted}; give make_prompt_cache(model)"
        )


def _native(model: nn.Module | _core.Model) -> _core.Model | None:
    if isinstance(model, _core.Model):
        return model
    return native_model_of(model) or native_model_of(accelerate(model))


def _vocab(model: nn.Module) -> int:
    """What the model's logits have; nothing is computed."""
    return int(model(mx.zeros((1, 1), mx.uint32), cache=make_prompt_cache(model)).shape[-1])


def dtype_name(model: nn.Module) -> str:
    """The type mlx-lm's layers compute in: that of the first weight that is not packed."""
    kinds = [array.dtype for _, array in tree_flatten(model.parameters()) if mx.issubdtype(array.dtype, mx.floating)]
    return str(kinds[0]).rpartition(".")[2] if kinds else "unknown"


def _stock_calls(model: nn.Module) -> int:
    return sum(report(model).stock_calls.values())


def _require_exit(model: nn.Module, native: _core.Model | None, options: Options, hosted: Sequence[str]) -> None:
    if native is None:
        raise UnsupportedModelError(
            f"early exit needs the native path, and this model has none ({report(model).reason}); give a draft model, or "
            "drafter='suffix'"
        )
    if hosted:
        raise ConfigurationError(
            f"early exit does not go with {', '.join(hosted)} in this version; leave one out, or give a draft model"
        )
    assert options.early_exit is not None
    require_exit(options.early_exit, native.layers, "the model")


def _all_but_the_last(callback: Progress | None, total: int) -> Progress | None:
    """What reading all tokens but the last one tells, as mlx-lm counts them."""
    return (lambda done, _: callback(done, total)) if callback else None


def _tell(error: Exception) -> None:
    warnings.warn(
        f"drafting failed, and plain decoding goes on ({type(error).__name__}: {error})", RuntimeWarning, stacklevel=2
    )


def _say_unknown() -> None:
    warnings.warn(
        "only samples of this sampler's law are known, so that a drafted token is kept where it is the target's own sample: "
        "exact, but fewer are kept. Samplers of mlx_lm's make_sampler without XTC, or temp, top_p, min_p and top_k, have a "
        "known law.",
        stacklevel=2,
    )
