"""Model families: short names, repositories, suggested drafts and tuned options."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from .errors import ConfigurationError
from .stats import expected_tokens

_NO_DRAFTS: Mapping[str, tuple[str, ...]] = MappingProxyType({})


@dataclass(frozen=True)
class Family:
    """Models that belong together, suggested drafts in the documented order, and the family's options."""

    name: str
    variants: tuple[str, ...]
    drafts: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: _NO_DRAFTS)
    gamma: int = 5
    temperature: float = 1.0
    top_k: float = 0.9
    lenience: float = 1.0


FAMILIES = (
    Family(
        "llama",
        (
            *("llama-3.2-1b", "llama-3.2-3b", "llama-3.1-8b", "llama-3.1-70b", "llama-3.1-405b", "llama-3.3-70b"),
            *("nemotron-70b", "llama-3-8b", "llama-3-70b"),
        ),
        {
            "llama-3.1-8b": ("llama-3.2-3b", "llama-3.2-1b"),
            "llama-3.1-70b": ("llama-3.2-3b", "llama-3.1-8b"),
            "llama-3.1-405b": ("llama-3.1-8b", "llama-3.2-3b"),
            "llama-3.3-70b": ("llama-3.2-3b", "llama-3.1-8b"),
            "llama-3.2-3b": ("llama-3.2-1b",),
            "nemotron-70b": ("llama-3.2-3b", "llama-3.1-8b"),  # a Llama 3.1
            "llama-3-70b": ("llama-3-8b",),  # Llama 3's token map is not 3.1's
        },
        gamma=6,
        lenience=1.1,
    ),
    Family(
        "qwen",
        (
            *("qwen-2.5-0.5b", "qwen-2.5-1.5b", "qwen-2.5-3b", "qwen-2.5-7b"),
            *("qwen-2.5-14b", "qwen-2.5-32b", "qwen-2.5-72b"),
            *("qwen-2.5-coder-1.5b", "qwen-2.5-coder-3b", "qwen-2.5-coder-7b"),
            *("qwen-2.5-coder-14b", "qwen-2.5-coder-32b", "qwen-2.5-math-7b", "qwen-2.5-math-72b"),
        ),
        {
            "qwen-2.5-7b": ("qwen-2.5-1.5b", "qwen-2.5-0.5b"),
            "qwen-2.5-14b": ("qwen-2.5-3b", "qwen-2.5-1.5b"),
            "qwen-2.5-72b": ("qwen-2.5-14b", "qwen-2.5-7b"),
            "qwen-2.5-32b": ("qwen-2.5-3b", "qwen-2.5-1.5b"),
            "qwen-2.5-3b": ("qwen-2.5-0.5b",),
            "qwen-2.5-1.5b": ("qwen-2.5-0.5b",),
            "qwen-2.5-coder-1.5b": ("qwen-2.5-0.5b",),
            "qwen-2.5-coder-3b": ("qwen-2.5-coder-1.5b",),
            "qwen-2.5-coder-7b": ("qwen-2.5-coder-1.5b", "qwen-2.5-coder-3b"),
            "qwen-2.5-coder-14b": ("qwen-2.5-coder-3b", "qwen-2.5-coder-1.5b"),
            "qwen-2.5-coder-32b": ("qwen-2.5-coder-3b", "qwen-2.5-coder-1.5b"),
            "qwen-2.5-math-7b": ("qwen-2.5-1.5b", "qwen-2.5-0.5b"),
            "qwen-2.5-math-72b": ("qwen-2.5-math-7b", "qwen-2.5-7b"),
        },
        gamma=4,
        temperature=0.8,
        top_k=0.85,
    ),
    Family(
        "deepseek",
        (
            *("deepseek-v3", "deepseek-r1", "deepseek-r1-distill-qwen-1.5b", "deepseek-r1-distill-qwen-7b"),
            *("deepseek-r1-distill-qwen-14b", "deepseek-r1-distill-qwen-32b"),
            *("deepseek-r1-distill-llama-8b", "deepseek-r1-distill-llama-70b"),
            *("deepseek-coder-v2-lite", "deepseek-coder-v2.5"),
        ),
        {
            "deepseek-v3": ("deepseek-r1-distill-qwen-7b",),
            "deepseek-r1": ("deepseek-r1-distill-llama-8b",),
            "deepseek-r1-distill-qwen-7b": ("deepseek-r1-distill-qwen-1.5b",),
            "deepseek-r1-distill-qwen-14b": ("deepseek-r1-distill-qwen-1.5b",),
            "deepseek-r1-distill-qwen-32b": ("deepseek-r1-distill-qwen-7b", "deepseek-r1-distill-qwen-1.5b"),
            "deepseek-r1-distill-llama-70b": ("deepseek-r1-distill-llama-8b",),
            "deepseek-coder-v2.5": ("deepseek-coder-v2-lite",),
        },
    ),
    Family(
        "qwen-3",
        ("qwen-3-0.6b", "qwen-3-1.7b", "qwen-3-4b", "qwen-3-8b", "qwen-3-14b", "qwen-3-32b"),
        {
            "qwen-3-1.7b": ("qwen-3-0.6b",),
            "qwen-3-4b": ("qwen-3-0.6b",),
            "qwen-3-8b": ("qwen-3-1.7b", "qwen-3-0.6b"),
            "qwen-3-14b": ("qwen-3-1.7b", "qwen-3-0.6b"),
            "qwen-3-32b": ("qwen-3-4b", "qwen-3-1.7b"),
        },
    ),
    Family(
        "gemma",
        ("gemma-2-2b", "gemma-2-9b", "gemma-2-27b", "gemma-3-1b", "gemma-3-4b", "gemma-3-12b", "gemma-3-27b"),
        {
            "gemma-2-9b": ("gemma-2-2b",),
            "gemma-2-27b": ("gemma-2-2b", "gemma-2-9b"),
            "gemma-3-4b": ("gemma-3-1b",),
            "gemma-3-12b": ("gemma-3-1b", "gemma-3-4b"),
            "gemma-3-27b": ("gemma-3-4b", "gemma-3-1b"),
        },
    ),
    Family(
        "mistral",
        ("mistral-7b", "mistral-nemo", "mistral-small-24b", "mistral-large"),
        {"mistral-large": ("mistral-7b",)},
    ),
    Family("phi", ("phi-3.5-mini", "phi-4", "phi-4-mini")),
    Family(
        "smollm-2",
        ("smollm-2-135m", "smollm-2-360m", "smollm-2-1.7b"),
        {"smollm-2-1.7b": ("smollm-2-135m", "smollm-2-360m"), "smollm-2-360m": ("smollm-2-135m",)},
    ),
)
DEFAULT_FAMILY = Family("default", ())

_MLX = "mlx-community/"
REPOSITORIES: Mapping[str, str] = {
    "llama-3.2-1b": _MLX + "Llama-3.2-1B-Instruct-4bit",
    "llama-3.2-3b": _MLX + "Llama-3.2-3B-Instruct-4bit",
    "llama-3.1-8b": _MLX + "Meta-Llama-3.1-8B-Instruct-4bit",
    "llama-3.1-70b": _MLX + "Meta-Llama-3.1-70B-Instruct-4bit",
    "llama-3.1-405b": _MLX + "Meta-Llama-3.1-405B-4bit",
    "llama-3.3-70b": _MLX + "Llama-3.3-70B-Instruct-4bit",
    "llama-3-8b": _MLX + "Meta-Llama-3-8B-Instruct-4bit",
    "llama-3-70b": _MLX + "Meta-Llama-3-70B-Instruct-4bit",
    "nemotron-70b": _MLX + "nvidia_Llama-3.1-Nemotron-70B-Instruct-HF_4bit",
    **{f"qwen-2.5-{size}": f"{_MLX}Qwen2.5-{size.upper()}-Instruct-4bit" for size in ("0.5b", "1.5b", "3b", "7b", "14b", "32b", "72b")},
    **{f"qwen-2.5-coder-{size}": f"{_MLX}Qwen2.5-Coder-{size.upper()}-Instruct-4bit" for size in ("1.5b", "3b", "7b", "14b", "32b")},
    **{f"qwen-2.5-math-{size}": f"{_MLX}Qwen2.5-Math-{size.upper()}-Instruct-4bit" for size in ("7b", "72b")},
    "deepseek-coder-v2-lite": _MLX + "DeepSeek-Coder-V2-Lite-Instruct-4bit-mlx",
    "deepseek-coder-v2.5": _MLX + "DeepSeek-V2.5-MLX-AQ4_1_64",
    "deepseek-v3": _MLX + "DeepSeek-V3-4bit",
    "deepseek-r1": _MLX + "DeepSeek-R1-4bit",
    **{
        f"deepseek-r1-distill-{base}-{size}": f"{_MLX}DeepSeek-R1-Distill-{base.title()}-{size.upper()}-4bit"
        for base, size in (("qwen", "1.5b"), ("qwen", "7b"), ("qwen", "14b"), ("qwen", "32b"), ("llama", "8b"), ("llama", "70b"))
    },
    **{name: f"{_MLX}Qwen3-{name.removeprefix('qwen-3-').upper()}-4bit" for name in FAMILIES[3].variants},
    **{name: f"{_MLX}{name}-it-4bit" for name in FAMILIES[4].variants},
    "mistral-7b": _MLX + "Mistral-7B-Instruct-v0.3-4bit",
    "mistral-nemo": _MLX + "Mistral-Nemo-Instruct-2407-4bit",
    "mistral-small-24b": _MLX + "Mistral-Small-24B-Instruct-2501-4bit",
    "mistral-large": _MLX + "Mistral-Large-Instruct-2407-4bit",
    "phi-3.5-mini": _MLX + "Phi-3.5-mini-instruct-4bit",
    "phi-4": _MLX + "phi-4-4bit",
    "phi-4-mini": _MLX + "Phi-4-mini-instruct-4bit",
    **{f"smollm-2-{size}": f"HuggingFaceTB/SmolLM2-{size.upper()}-Instruct" for size in ("135m", "360m", "1.7b")},
}  # fmt: skip

_PACKAGING = re.compile(
    r"[-_.:](instruct|chat|it|base|hf|mlx|gguf|dwq|awq|\d+-?bit|bf16|fp16|f16|q4|q8|aq4_1_64|v\d+(\.\d+)*|2[345]\d\d|corrected|latest)$"
)
_ALIASES = {
    "llama-3.1-nemotron-70b": "nemotron-70b",
    "nvidia-llama-3.1-nemotron-70b": "nemotron-70b",
    "deepseek-v2.5": "deepseek-coder-v2.5",
}
_SIZE = re.compile(r"-(\d+(?:\.\d+)?)([bm])$")


def _key(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name)


_BY_KEY = {_key(name): (name, family) for family in FAMILIES for name in family.variants}
_BY_KEY |= {_key(alias): _BY_KEY[_key(name)] for alias, name in _ALIASES.items()}
_BY_KEY |= {_key(name): (name, DEFAULT_FAMILY) for name in REPOSITORIES if _key(name) not in _BY_KEY}


def short_name(model: str) -> str:
    """The registry's name of a model id: `mlx-community/Meta-Llama-3.1-8B-Instruct-4bit` becomes `llama-3.1-8b`.

    Case, organisation, packaging suffixes and punctuation do not matter. Unknown ids come back in lower case, without
    organisation and packaging suffixes.
    """
    if not isinstance(model, str):
        raise ConfigurationError(f"a model is named by a directory, a repo id or a short name, not by {model!r}")
    name = re.split(r"[/\\]", model.strip().rstrip("/\\"))[-1].lower().removeprefix("meta-")
    while _key(name) not in _BY_KEY and (shorter := _PACKAGING.sub("", name)) != name:
        name = shorter
    return _BY_KEY[_key(name)][0] if _key(name) in _BY_KEY else name


def repository_of(model: str) -> str | None:
    """The hub repository of a model the registry knows; None for others."""
    return REPOSITORIES.get(short_name(model))


def family_of(target: str) -> Family:
    """The family of a model id, or the default family."""
    found = _BY_KEY.get(_key(short_name(target)))
    return found[1] if found else DEFAULT_FAMILY


def suggested_drafts(target: str) -> tuple[str, ...]:
    """Draft candidates of a target, in the documented order; empty when the registry knows none."""
    return family_of(target).drafts.get(short_name(target), ())


def parameters(model: str) -> float | None:
    """A model's parameters by its name, in billions; None when the name does not tell."""
    name = short_name(model)
    known = {
        "deepseek-v3": 671.0,
        "deepseek-r1": 671.0,
        "deepseek-coder-v2-lite": 16.0,
        "deepseek-coder-v2.5": 236.0,
        "mistral-nemo": 12.0,
        "mistral-small-24b": 24.0,
        "mistral-large": 123.0,
    }
    if found := _SIZE.search(name):
        return float(found[1]) / (1000 if found[2] == "m" else 1)
    return known.get(name)


def predicted_speedup(target: str, draft: str, acceptance: float = 0.8, row_cost: float = 0.05) -> float | None:
    """Tokens per second over plain decoding at the family's gamma; None where a size is unknown.

    S = E / (1 + gamma (c + v)) with E = (1 - a^(gamma + 1)) / (1 - a), c the ratio of parameters and v the cost of one
    more checked row (Leviathan et al. 2022, Theorem 3.8, arXiv:2211.17192, with the row's cost added).

    Args:
        acceptance: share a of drafted tokens that is accepted.
        row_cost: v, in forward passes of the target.
    """
    sizes = parameters(target), parameters(draft)
    if sizes[0] is None or sizes[1] is None:
        return None
    gamma = family_of(target).gamma
    return expected_tokens(acceptance, gamma) / (1 + gamma * (sizes[1] / sizes[0] + row_cost))


def ranked_drafts(target: str) -> tuple[str, ...]:
    """The suggested drafts, by predicted speed; those of unknown size last, in the documented order."""
    return tuple(sorted(suggested_drafts(target), key=lambda draft: -(predicted_speedup(target, draft) or 0.0)))


def explain_suggestion(target: str) -> str:
    """One line for people: the drafts of a target, those that promise most speed first, or why there is none."""
    if drafts := ranked_drafts(target):
        return f"{target}: draft {', then '.join(drafts)}"
    if repository_of(target) is None:
        return f"{target}: not in the registry, so no draft is known: suffix drafter"
    return f"{target}: no smaller sibling: suffix drafter"


def get_model_family_variants(target: str) -> dict[str, Any]:
    """The target's family: {'family', 'variants', 'suggested_drafts'}."""
    family = family_of(target)
    return {
        "family": family.name,
        "variants": list(family.variants),
        "suggested_drafts": list(suggested_drafts(target)),
    }


def suggest_speculative_config(target: str) -> dict[str, Any]:
    """The configuration suggested for a target: target and draft ids and the family's options.

    Unknown targets get the default family's options and no draft. `top_k` is the threshold (see SpeculativeConfig).
    """
    family = family_of(target)
    drafts = suggested_drafts(target)
    return {
        "target_model_id": target,
        "draft_model_id": drafts[0] if drafts else None,
        "gamma": family.gamma,
        "temperature": family.temperature,
        "top_k": family.top_k,
        "lenience": family.lenience,
    }


def family_options(target: str) -> dict[str, Any]:
    """The family's options under the names of SpeculativeConfig."""
    family = family_of(target)
    return {
        "gamma": family.gamma,
        "temperature": family.temperature,
        "top_k_threshold": family.top_k,
        "lenience": family.lenience,
    }
