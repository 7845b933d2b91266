"""The options of a request on mlx-lm models, under mlx-lm's names: their defaults, their ranges and the law they ask for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import mlx.core as mx
from mlx import nn

from .. import _core
from ..config import check_option, require_whole
from ..errors import ConfigurationError
from ..sampling import SamplingParams
from ..targets import Progress
from .cache import KEEP
from .samplers import Processor, Sampler, recognised

MOST_DRAFTED = 20
KV_BITS = (2, 3, 4, 5, 6, 8)  # of MLX's affine codes
KV_GROUP_SIZES = (32, 64, 128)
DRAFTERS = ("model", "suffix", "prompt-lookup", "combined", "early-exit", "none")
_SAMPLING = ("temp", "top_p", "min_p", "top_k")
_WHOLE_NUMBERS: tuple[tuple[str, int, int | None, str], ...] = (
    ("num_draft_tokens", 1, MOST_DRAFTED, ", or 'auto'"),
    ("max_kv_size", KEEP + 1, None, f": the first {KEEP} positions stay"),
    ("prefill_step_size", 1, None, ""),
    ("quantized_kv_start", 0, None, ""),
    ("seed", 0, 2**64 - 1, ""),
)


@dataclass(frozen=True)
class Options:
    """What a request asks for. The first group is mlx-lm's, with its names, meanings and defaults.

    Attributes:
        sampler: from log-probabilities (1, vocab) to a token. Of those that mlx-lm's `make_sampler` makes the law is known,
            and drafts are judged by rejection sampling. Of any other only samples are known: a drafted token is then kept
            if it is the target's own sample, which is exact too, and keeps fewer.
        logits_processors: functions of the tokens so far and logits (1, vocab), applied at every position.
        prompt_cache: caches that hold what came before the prompt; afterwards also the prompt and every token that was
            given out. Those of the draft may follow.
        max_kv_size: rotating caches of this size: the first 4 positions and the last ones. Models that run in mlx-lm's
            layers and make caches of their own leave it out, as in mlx-lm.
        prefill_step_size: tokens of the prompt in one pass.
        kv_bits, kv_group_size, quantized_kv_start: quantises the caches from this offset on, to 2, 3, 4, 5, 6 or 8 bits in
            groups of 32, 64 or 128.
        prompt_progress_callback: called with (done, total) tokens of the prompt.
        num_draft_tokens: drafted per round, 1 to 20; "auto" and None measure what pays, down to none.
        drafter: "model" (the default with a draft model), "suffix", "prompt-lookup", "combined" (suffix and model),
            "early-exit" (the default with early_exit) or "none" (the default without either).
        early_exit: the first layers of the model that draft, or "auto".
        temp, top_p, min_p, top_k: as for `make_sampler`, in place of a sampler; temp 0 is greedy.
        lenience: above 1 accepts more, and the law is no longer exactly the target's.
        rule: "token", "block" or "coupled"; None is block, with a seed and an automatic number of drafts coupled, and token
            where lenience is not 1.
        seed: of the random streams; None draws one from MLX's random state.
        logprobs: give log-probabilities also where the law is not written out (see GenerationResponse).

    Raises:
        ConfigurationError: a value outside its range, or options that exclude each other.
    """

    sampler: Sampler | None = None
    logits_processors: Sequence[Processor] | None = None
    prompt_cache: list[Any] | None = None
    max_kv_size: int | None = None
    prefill_step_size: int = 2048
    kv_bits: int | None = None
    kv_group_size: int = 64
    quantized_kv_start: int = 5000
    prompt_progress_callback: Progress | None = None

    num_draft_tokens: int | None = None  # "auto" becomes None
    drafter: str | None = None
    early_exit: int | Literal["auto"] | None = None
    temp: float | None = None
    top_p: float = 0.0
    min_p: float = 0.0
    top_k: int = 0
    lenience: float = 1.0
    rule: str | None = None
    seed: int | None = None
    logprobs: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.num_draft_tokens, str) and self.num_draft_tokens == "auto":
            object.__setattr__(self, "num_draft_tokens", None)
        for name, least, most, hint in _WHOLE_NUMBERS:
            value = getattr(self, name)
            if value is not None or getattr(Options, name) is not None:  # which is the default
                require_whole(name, value, least, most, hint)
        for name in ("lenience", "rule", "early_exit"):
            check_option(name, getattr(self, name))
        _require_choice("kv_bits", self.kv_bits, (None, *KV_BITS))
        _require_choice("kv_group_size", self.kv_group_size, KV_GROUP_SIZES)
        _require_choice("drafter", self.drafter, (None, *DRAFTERS))
        for name in ("sampler", "prompt_progress_callback"):
            value = getattr(self, name)
            if value is not None and not callable(value):
                raise ConfigurationError(f"{name} is {value!r:.100}, but must be a function")
        processors = self.logits_processors
        if processors is not None and not (isinstance(processors, Sequence) and all(map(callable, processors))):
            raise ConfigurationError(f"logits_processors is {processors!r:.100}, but must be a list of functions")
        if self.rule in ("block", "coupled") and self.lenience != 1:
            raise ConfigurationError(f"the {self.rule} rule takes lenience 1, not {self.lenience:g}; use rule='token'")
        if self.drafter == "early-exit" and self.early_exit is None:
            raise ConfigurationError(
                "the early-exit drafter needs a layer; give early_exit=N, or 'auto' to measure which"
            )
        if self.early_exit is not None and self.drafter not in (None, "early-exit"):
            raise ConfigurationError(
                f"early_exit {self.early_exit} and drafter {self.drafter} are two ways to draft; give one of them"
            )
        if self.sampler is not None and any(getattr(self, name) for name in _SAMPLING):
            raise ConfigurationError("a sampler has its own temp, top_p, min_p and top_k; give one or the other")

    def sampling(self) -> SamplingParams | None:
        """The law, or None where only samples of it are known."""
        options = (
            {name: getattr(self, name) for name in _SAMPLING} if self.sampler is None else recognised(self.sampler)
        )
        if options is None:
            return None
        return SamplingParams(
            temperature=options.get("temp") or 0.0,
            top_p=options.get("top_p") or 1.0,
            min_p=options.get("min_p") or 0.0,
            top_k=options.get("top_k") or 0,
            truncation="mlx",
            seed=_drawn_seed() if self.seed is None else self.seed,
        )

    def drafter_name(self, draft_model: nn.Module | _core.Model | None) -> str:
        """Who drafts.

        Raises:
            ConfigurationError: a drafter that needs a draft model where there is none, or one beside an early exit.
        """
        if draft_model is not None and self.early_exit is not None:
            raise ConfigurationError(
                f"early_exit {self.early_exit} and a draft model are two ways to draft; give one of them"
            )
        default = "early-exit" if self.early_exit is not None else "none" if draft_model is None else "model"
        name = self.drafter or default
        if name in ("model", "combined") and draft_model is None:
            raise ConfigurationError(f"the {name} drafter needs a draft model; give draft_model, or use 'suffix'")
        return name


def options_of(function: str, options: Mapping[str, Any]) -> Options:
    """The options that a function was called with.

    Raises:
        TypeError: one that it does not have.
    """
    known = [field.name for field in fields(Options)]
    for name in options:
        if name not in known:
            raise TypeError(f"{function}() got an unexpected option {name!r}; the options are {', '.join(known)}")
    return Options(**options)


def _require_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    if isinstance(value, bool | float) or value not in choices:
        shown = ", ".join(str(choice) for choice in choices if choice is not None)
        raise ConfigurationError(f"{name} is {value!r:.100}, but must be one of {shown}")


def _drawn_seed() -> int:
    """52 bits of MLX's random state, so that mx.random.seed seeds requests too."""
    high, low = mx.random.randint(0, 1 << 26, (2,)).tolist()
    return int(high) << 26 | int(low)
