"""The engine: a configuration, the models it names, and the requests on them."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from . import _core, hub
from .checkpoint import check_isa, load_model
from .config import NO_DRAFT, ResolvedConfig, SpeculativeConfig, resolve_config
from .context import Context
from .controllers import AutoGamma, FixedGamma
from .drafters import CombinedDrafter, CopyDrafter, Drafter, EarlyExitDrafter, ModelDrafter, NoDrafter
from .early_exit import Exit
from .errors import ConfigurationError, ContextFullError
from .generation import Generation, Result, Terms
from .measurements import Measurements
from .measurements_file import load_measurements, measurements_path, save_measurements
from .models import LoadModel, ModelPair, Notify, Prompt, Resolve, check_prompt, print_notice
from .sampling import Mask, SamplingParams
from .stats import SpeculationStats
from .targets import MakeTarget, NativeTarget, Progress, RequestTarget
from .text import StopStrings, StreamDecoder, TextStream

WORTH_KEEPING = 32  # passes of a request from which measurements are written down


class Engine:
    """Generates text with a target model and, where it fits, a draft. Build one with `specfast.load`.

    Models are loaded when first needed. Every request has its own caches: several may be under way at once.

    Args:
        resolved: the configuration, with the source of each value.
        precision: of the activations: "int8", "bf16" or "f32"; None chooses by the weights.
        max_context: bounds the context below the model's own.
        isa: kernel table to use; None is the best.
        notify: told, once each, what people should know.
        resolve: finds a model's directory by its name; None is `hub.resolve`.
        kv_bits: of keys and values, 8 or 16; None is 16 (f32 with f32 activations).
        layers: only these of the target's layers are run here; `make_target` has the others run elsewhere.
        make_target: makes a request's target, from what NativeTarget takes.
        load_target, load_draft: load a model's directory, from what `checkpoint.load_model` takes.

    Raises:
        ConfigurationError: something this version cannot do, a context below 1, or a kernel table that cannot be used.
    """

    def __init__(
        self,
        resolved: ResolvedConfig | None = None,
        precision: str | None = None,
        max_context: int | None = None,
        isa: str | None = None,
        notify: Notify = print_notice,
        resolve: Resolve | None = None,
        kv_bits: int | None = None,
        layers: range | None = None,
        make_target: MakeTarget = NativeTarget,
        load_target: LoadModel = load_model,
        load_draft: LoadModel = load_model,
    ) -> None:
        self.resolved = resolved or resolve_config()
        self.config.require_available()
        check_isa(isa)
        whole = isinstance(max_context, int) and not isinstance(max_context, bool)
        if max_context is not None and not (whole and max_context >= 1):
            raise ConfigurationError(
                f"a context of {max_context!r} cannot be; give a whole number, at least 1, or none for the model's"
            )
        self.stats = SpeculationStats()
        self._precision, self._max_context, self._isa, self._notify = precision, max_context, isa, notify
        self._resolve = resolve or hub.resolve
        self._kv_bits = kv_bits
        self.layers, self._make_target = layers, make_target
        self._load_target, self._load_draft = load_target, load_draft
        self._pair: ModelPair | None = None
        self._said: set[str] = set()
        self._measured: dict[Path | None, Measurements] = {}

    @property
    def config(self) -> SpeculativeConfig:
        """The effective configuration."""
        return self.resolved.config

    @property
    def pair(self) -> ModelPair:
        """The models, loaded now if they are not yet.

        Raises:
            ModelFormatError, UnsupportedModelError, DownloadError: a model that cannot be had.
        """
        if self._pair is None:
            self._pair = self._load(self.config)
        return self._pair

    @property
    def max_context(self) -> int:
        """Most tokens of a request, prompt included; loads the models."""
        return self.pair.target.model.max_context

    @property
    def precision(self) -> str:
        """Of the target's activations; loads the models."""
        return self.pair.target.precision

    @property
    def drafter(self) -> str:
        """Who drafts: "model", "suffix", "prompt-lookup", "combined" or "none"; loads the models."""
        return self._drafter_name(self.resolved, self.pair)

    def _load(self, config: SpeculativeConfig) -> ModelPair:
        pair = ModelPair.load(
            config,
            self._precision,
            self._max_context,
            self._isa,
            self._say_once,
            self._resolve,
            self._kv_bits,
            self.layers,
            self._load_target,
            self._load_draft,
        )
        asked, started = _core.num_threads(), _core.start_threads()
        if started < asked:
            self._say_once(
                f"the system started {started} of {asked} threads, which do all the work: the same results, more slowly. "
                "Raise its limits on processes and memory (ulimit -u, ulimit -v), or ask for fewer threads"
            )
        return pair

    def describe(self, *, seeded: bool = False) -> str:
        """One line with every effective value and where it came from; loads the models.

        Args:
            seeded: whether requests give a seed, which may choose the rule.
        """
        pair = self.pair
        return self.resolved.describe(
            target_model=pair.target_name,
            draft_model=pair.draft_name or "none",
            target_engine=f"native {pair.target.precision}",
            drafter=self.drafter,
            gamma=self._gamma(self.resolved, self.drafter)[0],
            rule=self._rule(self.resolved, self.drafter, seeded=seeded),
        )

    def set_models(self, target: str | None, draft: str | None = None) -> None:
        """Changes the models, for requests from now on; those under way keep theirs.

        If models are loaded, the new ones are loaded before this returns.

        Raises:
            SpecfastError: they cannot be used; the engine keeps those it had.
        """
        resolved = self.resolved.with_models(target, draft)
        pair = self._load(resolved.config) if self._pair else None
        self.resolved, self._pair, self._measured = resolved, pair, {}

    def get_speculation_stats(self) -> dict[str, Any]:
        """Counters and rates since the engine was built; works before any model is loaded.

        Returns:
            model_family_compatibility ("compatible", "incompatible" or "unknown"), acceptance_rate (a float),
            lossless, rule (of requests without a seed), lenience (no token gets more than max(1, lenience) times its
            probability), precision, target_model, draft_model, drafter (None before a model is loaded, unless typed), and
            the counters of SpeculationStats.
        """
        pair, config = self._pair, self.config
        return {
            "model_family_compatibility": pair.compatibility if pair else "unknown",
            "lossless": config.lossless or (pair is not None and self._drafter_name(self.resolved, pair) == "none"),
            "rule": config.effective_rule,
            "lenience": config.lenience,
            "precision": pair.target.precision if pair else (self._precision or "unknown"),
            "target_model": config.target_model,
            "draft_model": config.draft_model,
            "drafter": self._drafter_name(self.resolved, pair) if pair else config.drafter,
            **self.stats.as_dict(),
        }

    def generate(self, prompt: Prompt, **options: Any) -> Result:
        """Generates to the end; takes what `stream` takes."""
        generation = self.stream(prompt, **options)
        for _ in generation:
            pass
        return generation.result()

    def stream(
        self,
        prompt: Prompt,
        *,
        max_tokens: int = 256,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        top_k: int | None = None,
        top_p: float = 1.0,
        min_p: float = 0.0,
        truncation: str = "hf",
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        penalty_window: int = 0,
        logit_bias: Mapping[int, float] | None = None,
        mask: Mask | None = None,
        raw: bool = False,
        system: str | None = None,
        ignore_eos: bool = False,
        progress: Progress | None = None,
        **request: Any,
    ) -> Generation:
        """Generates chunk by chunk.

        Args:
            prompt: text (put through the model's chat template if it has one, unless raw), messages with role and
                content, or token ids taken as they are.
            max_tokens: most tokens to generate.
            seed: of the random streams; None draws one. With a seed, an automatic gamma and neither rule nor lenience given
                the rule is coupled, so that timing cannot change the text.
            stop: strings that end the text and are not part of it.
            top_k: keeps this many tokens, 0 all. It replaces the threshold unless that was given too.
            top_p, min_p: further truncation of the law.
            truncation, repetition_penalty, presence_penalty, frequency_penalty, penalty_window, logit_bias, mask: see
                SamplingParams; target and draft are changed alike, at every position by the tokens before it.
            system: a system message put before a text prompt, through the chat template.
            ignore_eos: go on after end tokens (for measurements).
            progress: called with (done, total) while the prompt is read.
            **request: options of SpeculativeConfig for this request: gamma, temperature, top_k_threshold, lenience,
                drafter, rule, disabled.

        Raises:
            ConfigurationError: bad options, or a prompt of 0 tokens, or one that is neither text, messages nor token ids.
            ContextFullError: a prompt that leaves no room in the context.
            ModelFormatError: a file of the models was written in place since they were loaded.
            NumericalError: logits that are not finite.
        """
        fixed = {"target_model", "draft_model", "auto_config", "target_engine", "draft_engine", "early_exit"}
        models = sorted(set(request) & fixed)
        if models:
            raise ConfigurationError(
                f"{models[0]} cannot change with a request; use set_models or build another engine"
            )
        resolved = self.resolved.with_request(request)
        config = resolved.config
        config.require_available()
        if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 1:
            raise ConfigurationError(f"max_tokens is {max_tokens!r}, but must be a whole number, at least 1")
        sampling = SamplingParams(
            temperature=config.temperature,
            top_k_threshold=self._threshold(resolved, top_k),
            top_k=top_k or 0,
            top_p=top_p,
            min_p=min_p,
            truncation=truncation,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            penalty_window=penalty_window,
            logit_bias={} if logit_bias is None else logit_bias,
            mask=mask,
            seed=secrets.randbits(53) if seed is None else seed,
        )
        stops = StopStrings(stop)
        prompt = check_prompt(prompt)
        if system and (raw or not isinstance(prompt, str)):
            raise ConfigurationError(
                "a system message needs a text prompt, and a chat template to put both in; leave raw out"
            )

        pair = self.pair
        pair.require_unchanged()
        tokens = pair.encode(prompt, raw=raw, system=system)
        capacity = pair.target.model.max_context
        if len(tokens) >= capacity:
            raise ContextFullError(
                f"the prompt has {len(tokens)} tokens, but the context holds {capacity} and one must be left to generate; "
                "shorten the prompt"
            )
        law = sampling.law(pair.target.model.vocab, pair.vocab)
        ends = frozenset() if ignore_eos else frozenset(pair.eos_ids)
        adjustments = sampling.adjustments(len(tokens), pair.vocab, ends)
        name = self._drafter_name(resolved, pair)
        if seed is not None and law.temperature > 0 and not self._asked(resolved, pair):
            name = "none"  # with a seed, the text is that of plain decoding unless someone asks for a drafter
        rule = "greedy" if law.temperature == 0 else self._rule(resolved, name, seeded=seed is not None)
        native_rule = "token" if rule == "greedy" else rule
        context = Context(
            tokens,
            max_tokens,
            capacity,
            ends,
            TextStream(StreamDecoder(pair.tokenizer, continues=True), stops),
            whole_rounds=rule == "block",
        )
        exact = config.lenience <= 1 or law.temperature == 0 or name == "none"
        if not exact:
            self._say_once(
                f"lenience {config.lenience:g} accepts more drafts, and the output law is no longer the target's: a token "
                f"can get up to {config.lenience:g} times its probability. Lenience 1 is exact."
            )
        lenience = config.lenience if native_rule == "token" else 1.0
        target = self._make_target(pair.target.model, law, lenience, sampling.seed, capacity, native_rule, adjustments)
        gamma, ceiling = self._gamma(resolved, name) if name != "none" else (0, 0)
        if gamma == "auto" and seed is not None and rule not in ("greedy", "coupled"):
            gamma = min(ceiling, 5)
            self._say_once(
                f"gamma is fixed at {gamma}: with a seed, timing must not change the text; the coupled rule lets gamma vary"
            )
        alone = gamma == "auto" and self.layers is None  # times of a ring are its network's
        path = measurements_path(pair.target, pair.draft, pair.early_exit) if alone else None

        def ended(stats: SpeculationStats) -> None:
            target.close()
            self.stats.add(stats)
            if gamma == "auto" and stats.target_passes >= WORTH_KEEPING:
                save_measurements(path, self._measured[path])

        drafter = NoDrafter() if name == "none" else self._make_drafter(name, pair, target, gamma, ceiling)
        return Generation(
            context,
            target,
            drafter,
            FixedGamma(gamma) if gamma != "auto" else AutoGamma(ceiling, self._measurements(path)),
            progress=progress,
            terms=Terms(sampling.seed, gamma, name, exact, pair.target.precision, rule),
            on_draft_failure=self._draft_failed,
            on_end=ended,
        )

    def _make_drafter(
        self, name: str, pair: ModelPair, target: RequestTarget, gamma: int | Literal["auto"], ceiling: int
    ) -> Drafter:
        if name in ("suffix", "prompt-lookup"):
            return CopyDrafter(name)
        if name == "early-exit":

            def chosen(found: Exit) -> None:
                self._say_once(f"early exit after layer {found.layers} of {pair.target.model.layers}")

            assert pair.early_exit is not None
            assert isinstance(target, NativeTarget)
            gammas = range(1, ceiling + 1) if gamma == "auto" else (gamma,)
            return EarlyExitDrafter(target, pair.early_exit, gammas=gammas, on_choice=chosen)
        assert pair.draft is not None
        draws = target.law, target.seed, target.capacity, target.rule, target.adjustments
        model = ModelDrafter(pair.draft.model, *draws)
        return model if name == "model" else CombinedDrafter({"suffix": CopyDrafter("suffix"), "model": model})

    def _draft_failed(self, error: Exception) -> None:
        self._say_once(f"drafting failed, and plain decoding goes on ({type(error).__name__}: {error})")

    @staticmethod
    def _threshold(resolved: ResolvedConfig, top_k: int | None) -> float:
        """The threshold, unless a typed top_k replaces an untyped one."""
        given = resolved.sources["top_k_threshold"] in ("request", "typed")
        return resolved.config.top_k_threshold if given or top_k is None else 0.0

    @staticmethod
    def _drafter_name(resolved: ResolvedConfig, pair: ModelPair) -> str:
        """Who drafts: the one typed, else the early exit that was asked for, else both copies and the draft where there is
        one, else copies alone.

        A draft that was named and refused means plain decoding, as its warning says, and so does the draft "none".

        Raises:
            ConfigurationError: a drafter that needs a draft where none was named.
        """
        config = resolved.config
        if config.disabled:
            return "none"
        named = config.draft_model is not None and (config.draft_model == NO_DRAFT or not config.auto_config)
        refused = pair.draft is None and named
        if config.drafter in ("model", "combined") and pair.draft is None and not refused:
            raise ConfigurationError(
                f"the {config.drafter} drafter needs a draft model, and there is none; name one with "
                "--speculative-draft-model, or use 'suffix', which needs none"
            )
        if config.drafter is not None:
            return "none" if refused and config.drafter in ("model", "combined") else config.drafter
        if pair.early_exit is not None:
            return "early-exit"
        return "combined" if pair.draft else "none" if refused else "suffix"

    @staticmethod
    def _asked(resolved: ResolvedConfig, pair: ModelPair) -> bool:
        """Whether someone asked for speculation: a drafter, a draft, a gamma, or the family's defaults."""
        asked = (resolved.sources[name] != "default" for name in ("drafter", "gamma"))
        drafts = pair.draft is not None or pair.early_exit is not None
        return drafts or resolved.config.auto_config or any(asked)

    @staticmethod
    def _gamma(resolved: ResolvedConfig, drafter: str) -> tuple[int | Literal["auto"], int]:
        """What gamma is said to be, and the most it can be: a typed number is fixed, a family's is a ceiling, and for copies
        and an automatic exit it is automatic unless typed."""
        gamma, source = resolved.config.gamma, resolved.sources["gamma"]
        exits = drafter == "early-exit" and resolved.config.early_exit == "auto"
        if gamma == "auto" or (source == "default" and (exits or drafter in ("suffix", "prompt-lookup"))):
            return "auto", 20
        return ("auto" if source == "family" else gamma), gamma

    def _measurements(self, path: Path | None) -> Measurements:
        if path not in self._measured:
            self._measured[path] = load_measurements(path)
        return self._measured[path]

    @classmethod
    def _rule(cls, resolved: ResolvedConfig, drafter: str, *, seeded: bool) -> str:
        """The rule of a request: coupled where a seed must give the same text whatever an automatic gamma does."""
        config = resolved.config
        automatic = cls._gamma(resolved, drafter)[0] == "auto" and config.rule is None and config.lenience == 1.0
        return "coupled" if seeded and automatic and not config.greedy else config.effective_rule

    def _say_once(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            self._notify(message)
