"""Model families: short names, repositories, suggested drafts and tuned options."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Family:
    """Models that share a tokenizer, smallest draft candidates in the documented order, and the family's options."""

    name: str
    variants: tuple[str, ...]
    drafts: dict[str, tuple[str, ...]] = field(default_factory=dict)
    gamma: int = 5
    temperature: float = 1.0
    top_k: float = 0.9
    lenience: float = 1.0


FAMILIES = (
    Family(
        "llama",
        ("llama-3.2-1b", "llama-3.2-3b", "llama-3.1-8b", "llama-3.1-70b", "llama-3.1-405b", "llama-3.3-70b"),
        {
            "llama-3.2-3b": ("llama-3.2-1b",),
            "llama-3.1-8b": ("llama-3.2-3b", "llama-3.2-1b"),
            "llama-3.1-70b": ("llama-3.2-3b", "llama-3.1-8b"),
            "llama-3.1-405b": ("llama-3.1-8b", "llama-3.2-3b"),
            "llama-3.3-70b": ("llama-3.2-3b", "llama-3.1-8b"),
        },
        gamma=6,
        lenience=1.1,
    ),
    Family(
        "qwen",
        ("qwen-2.5-0.5b", "qwen-2.5-1.5b", "qwen-2.5-3b", "qwen-2.5-7b", "qwen-2.5-14b", "qwen-2.5-32b", "qwen-2.5-72b"),
        {
            "qwen-2.5-1.5b": ("qwen-2.5-0.5b",),
            "qwen-2.5-3b": ("qwen-2.5-0.5b",),
            "qwen-2.5-7b": ("qwen-2.5-1.5b", "qwen-2.5-0.5b"),
            "qwen-2.5-14b": ("qwen-2.5-3b", "qwen-2.5-1.5b"),
            "qwen-2.5-32b": ("qwen-2.5-3b", "qwen-2.5-1.5b"),
            "qwen-2.5-72b": ("qwen-2.5-14b", "qwen-2.5-7b"),
        },
        gamma=4,
        temperature=0.8,
        top_k=0.85,
    ),
    Family(
        "qwen3",
        ("qwen-3-0.6b", "qwen-3-1.7b", "qwen-3-4b", "qwen-3-8b", "qwen-3-14b", "qwen-3-32b"),
        {
            "qwen-3-1.7b": ("qwen-3-0.6b",),
            "qwen-3-4b": ("qwen-3-0.6b",),
            "qwen-3-8b": ("qwen-3-1.7b", "qwen-3-0.6b"),
            "qwen-3-14b": ("qwen-3-1.7b", "qwen-3-0.6b"),
            "qwen-3-32b": ("qwen-3-4b", "qwen-3-1.7b"),
        },
        gamma=4,
        temperature=0.8,
        top_k=0.85,
    ),
    Family(
        "deepseek",
        ("deepseek-v3", "deepseek-r1", "deepseek-r1-distill-qwen-1.5b", "deepseek-r1-distill-qwen-7b", "deepseek-r1-distill-llama-8b"),
        {
            "deepseek-v3": ("deepseek-r1-distill-qwen-7b",),
            "deepseek-r1": ("deepseek-r1-distill-llama-8b",),
            "deepseek-r1-distill-qwen-7b": ("deepseek-r1-distill-qwen-1.5b",),
        },
    ),
    Family("gemma", ("gemma-2-2b", "gemma-2-9b", "gemma-2-27b"), {"gemma-2-9b": ("gemma-2-2b",), "gemma-2-27b": ("gemma-2-9b", "gemma-2-2b")}),
    Family("mistral", ("mistral-7b", "mistral-nemo", "mistral-large"), {"mistral-large": ("mistral-7b",)}),
    Family("phi", ("phi-3.5-mini", "phi-4"), {}),
)  # fmt: skip
DEFAULT_FAMILY = Family("default", ())

REPOSITORIES = {
    "llama-3.2-1b": "mlx-community/Llama-3.2-1B-Instruct-4bit",
    "llama-3.2-3b": "mlx-community/Llama-3.2-3B-Instruct-4bit",
    "llama-3.1-8b": "mlx-community/Meta-Llama-3.1-8B-Instruct-4bit",
    "llama-3.1-70b": "mlx-community/Meta-Llama-3.1-70B-Instruct-4bit",
    "llama-3.1-405b": "mlx-community/Meta-Llama-3.1-405B-4bit",
    "llama-3.3-70b": "mlx-community/Llama-3.3-70B-Instruct-4bit",
    **{f"qwen-2.5-{size}": f"mlx-community/Qwen2.5-{size.upper()}-Instruct-4bit" for size in ("0.5b", "1.5b", "3b", "7b", "14b", "32b", "72b")},
    **{f"qwen-3-{size}": f"mlx-community/Qwen3-{size.upper()}-4bit" for size in ("0.6b", "1.7b", "4b", "8b", "14b", "32b")},
    "deepseek-v3": "mlx-community/DeepSeek-V3-4bit",
    "deepseek-r1": "mlx-community/DeepSeek-R1-4bit",
    "deepseek-r1-distill-qwen-1.5b": "mlx-community/DeepSeek-R1-Distill-Qwen-1.5B-4bit",
    "deepseek-r1-distill-qwen-7b": "mlx-community/DeepSeek-R1-Distill-Qwen-7B-4bit",
    "deepseek-r1-distill-llama-8b": "mlx-community/DeepSeek-R1-Distill-Llama-8B-4bit",
    "gemma-2-2b": "mlx-community/gemma-2-2b-it-4bit",
    "gemma-2-9b": "mlx-community/gemma-2-9b-it-4bit",
    "gemma-2-27b": "mlx-community/gemma-2-27b-it-4bit",
    "mistral-7b": "mlx-community/Mistral-7B-Instruct-v0.3-4bit",
    "mistral-nemo": "mlx-community/Mistral-Nemo-Instruct-2407-4bit",
    "mistral-large": "mlx-community/Mistral-Large-Instruct-2407-4bit",
    "phi-3.5-mini": "mlx-community/Phi-3.5-mini-instruct-4bit",
    "phi-4": "mlx-community/phi-4-4bit",
}  # fmt: skip

_SUFFIXES = re.compile(r"-(instruct|chat|it|base|hf|mlx|\d+bit|bf16|fp16|q4|q8|v\d+(\.\d+)*|\d{4})$")


def short_name(model: str) -> str:
    """The registry's name of a model id: `mlx-community/Meta-Llama-3.1-8B-Instruct-4bit` becomes `llama-3.1-8b`.

    Unknown ids come back normalised (lower case, without organisation and packaging suffixes).
    """
    name = model.strip().rstrip("/").rsplit("/", 1)[-1].lower().replace("_", "-")
    name = name.removeprefix("meta-")
    name = re.sub(r"^(qwen|llama|gemma|phi)(?=\d)", r"\1-", name)
    while (shorter := _SUFFIXES.sub("", name)) != name:
        name = shorter
    return name


def family_of(target: str) -> Family:
    """The family of a model id, or the default family."""
    name = short_name(target)
    for family in FAMILIES:
        if name in family.variants:
            return family
    return DEFAULT_FAMILY


def suggested_drafts(target: str) -> tuple[str, ...]:
    """Draft candidates of a target, in the documented order; empty when the registry knows none."""
    return family_of(target).drafts.get(short_name(target), ())


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

    Unknown targets get the default family's options and no draft.
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
