"""exo's requests on specfast's MLX host: `--speculative-target-engine mlx`, any architecture of mlx-lm's, on Metal where it is."""

from __future__ import annotations

import importlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..architecture import read_json
from ..compatibility import Status
from ..config import EarlyExit, ResolvedConfig, SpeculativeConfig, kept_by_threshold
from ..engine import Engine
from ..errors import ContextFullError, ModelFormatError
from ..generation import Generation
from ..models import check_prompt, choose_draft
from ..targets import Progress
from .hosts import Host


@dataclass(frozen=True)
class MlxModel:
    """A model of mlx-lm's, accelerated where specfast knows it.

    Attributes:
        module: mlx-lm's model.
        eos_ids: tokens that end its text.
        max_context, vocab: by its config.json.
        precision: of the activations.
    """

    module: Any
    eos_ids: frozenset[int]
    max_context: int
    vocab: int
    precision: str

    @classmethod
    def load(cls, directory: Path) -> MlxModel:
        """Loads a directory. In the thread that will compute.

        Raises:
            ModelFormatError: mlx-lm cannot.
        """
        mlx_lm, mlx = importlib.import_module("mlx_lm"), importlib.import_module("specfast.mlx")
        try:
            module, tokenizer = mlx_lm.load(str(directory))
        except (ValueError, KeyError, FileNotFoundError, RuntimeError) as error:
            raise ModelFormatError(
                f"{directory}: mlx-lm cannot load it ({str(error).strip() or type(error).__name__}); leave "
                "--speculative-target-engine out for specfast's own decoder"
            ) from None
        report = mlx.report(mlx.accelerate(module))
        values = read_json(directory / "config.json")
        values = {**values, **(values.get("text_config") or {})}
        precision = report.precision or importlib.import_module("specfast.mlx.requests").dtype_name(module)
        ends = frozenset(int(token) for token in tokenizer.eos_token_ids)
        return cls(
            module, ends, int(values.get("max_position_embeddings") or 8192), int(values["vocab_size"]), precision
        )


@dataclass(frozen=True)
class MlxPair:
    """A target and its draft, mlx-lm's or a native model, with what exo is told of them; see ModelPair."""

    target: MlxModel
    draft: Any
    draft_name: str | None
    compatibility: Status
    early_exit: EarlyExit


class MlxEngine(Engine):
    """specfast.Engine for requests of token ids, on a target of mlx-lm's. Everything in one thread, where MLX has its streams.

    Args:
        draft: where drafts run; "mlx" is a model of mlx-lm's, whose rounds MLX evaluates with the target's.
        options: of Engine.
    """

    def __init__(self, resolved: ResolvedConfig, draft: Host, **options: Any) -> None:
        super().__init__(resolved, **options)
        self._draft_host = draft

    @property
    def max_context(self) -> int:
        return self._mlx.target.max_context

    @property
    def precision(self) -> str:
        return self._mlx.target.precision

    @property
    def _mlx(self) -> MlxPair:
        pair: Any = self.pair
        assert isinstance(pair, MlxPair)
        return pair

    def _load(self, config: SpeculativeConfig) -> Any:
        assert config.target_model is not None
        directory = self._resolve(config.target_model)
        choice = choose_draft(config, directory, self._say_once, self._resolve)
        draft: Any = None
        if choice.directory:
            on_mlx = self._draft_host.name == "mlx"
            draft = MlxModel.load(choice.directory).module if on_mlx else self._draft_host.load(choice.directory).model
        early_exit = None if config.disabled else config.early_exit
        name = choice.name if early_exit is None else f"early exit {early_exit}"
        return MlxPair(MlxModel.load(directory), draft, name, choice.status, early_exit)

    def stream(  # type: ignore[override]
        self,
        prompt: Sequence[int],
        *,
        max_tokens: int = 256,
        seed: int | None = None,
        top_k: int | None = None,
        top_p: float = 1.0,
        min_p: float = 0.0,
        progress: Progress | None = None,
        **request: Any,
    ) -> Generation:
        """As Engine.stream, for what exo asks."""
        requests = importlib.import_module("specfast.mlx.requests")
        resolved = self.resolved.with_request(request)
        config, pair = resolved.config, self._mlx
        tokens = [int(token) for token in check_prompt(prompt)]  # type: ignore[arg-type]
        if len(tokens) >= self.max_context:
            raise ContextFullError(
                f"the prompt has {len(tokens)} tokens, but the context holds {self.max_context} and one must be left to generate; "
                "shorten the prompt"
            )
        kept = kept_by_threshold(self._threshold(resolved, top_k), pair.target.vocab)
        keep = min((k for k in (top_k or 0, kept) if 0 < k < pair.target.vocab), default=0)
        temperature = 0.0 if keep == 1 else config.temperature
        like: Any = pair
        name = self._drafter_name(resolved, like)
        if seed is not None and temperature > 0 and not self._asked(resolved, like):
            name = "none"
        gamma = self._gamma(resolved, name)[0]
        sampled = {"top_k": keep, "top_p": top_p, "min_p": min_p} if temperature > 0 else {}
        options = importlib.import_module("specfast.mlx.options").Options(
            temp=temperature,
            **sampled,
            num_draft_tokens=None if gamma == "auto" else gamma,
            drafter=name,
            early_exit=pair.early_exit if name == "early-exit" else None,
            lenience=config.lenience,
            rule=config.rule,
            seed=secrets.randbits(53) if seed is None else seed,
            prompt_progress_callback=progress,
        )
        draft = pair.draft if name in ("model", "combined") else None
        limit = min(max_tokens, self.max_context - len(tokens))
        found = requests.begin(pair.target.module, draft, tokens, limit, pair.target.eos_ids, options).generation
        assert isinstance(found, Generation)
        return found
