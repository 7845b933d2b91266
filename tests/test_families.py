"""Families: the document's table and options, and names in all their spellings."""

import pytest
from specfast import get_model_family_variants, suggest_speculative_config
from specfast.families import (
    FAMILIES,
    REPOSITORIES,
    explain_suggestion,
    parameters,
    predicted_speedup,
    ranked_drafts,
    repository_of,
    short_name,
    suggested_drafts,
)

TABLE = {
    "llama-3.1-8b": ["llama-3.2-3b", "llama-3.2-1b"],
    "llama-3.1-70b": ["llama-3.2-3b", "llama-3.1-8b"],
    "llama-3.1-405b": ["llama-3.1-8b", "llama-3.2-3b"],
    "llama-3.3-70b": ["llama-3.2-3b", "llama-3.1-8b"],
    "qwen-2.5-7b": ["qwen-2.5-1.5b", "qwen-2.5-0.5b"],
    "qwen-2.5-14b": ["qwen-2.5-3b", "qwen-2.5-1.5b"],
    "qwen-2.5-72b": ["qwen-2.5-14b", "qwen-2.5-7b"],
    "deepseek-v3": ["deepseek-r1-distill-qwen-7b"],
    "deepseek-r1": ["deepseek-r1-distill-llama-8b"],
}
EXO_TEXT_MODELS = {
    "llama-3.3-70b": "llama-3.2-3b",
    "llama-3.2-1b": None,
    "llama-3.2-1b-8bit": None,
    "llama-3.2-3b": "llama-3.2-1b",
    "llama-3.2-3b-8bit": "llama-3.2-1b",
    "llama-3.2-3b-bf16": "llama-3.2-1b",
    "llama-3.1-8b": "llama-3.2-3b",
    "llama-3.1-70b": "llama-3.2-3b",
    "llama-3.1-70b-bf16": "llama-3.2-3b",
    "llama-3.1-405b": "llama-3.1-8b",
    "llama-3.1-405b-8bit": "llama-3.1-8b",
    "llama-3-8b": None,
    "llama-3-70b": "llama-3-8b",
    "nemotron-70b": "llama-3.2-3b",
    "nemotron-70b-bf16": "llama-3.2-3b",
    "mistral-nemo": None,
    "mistral-large": "mistral-7b",
    "deepseek-coder-v2-lite": None,
    "deepseek-coder-v2.5": "deepseek-coder-v2-lite",
    "deepseek-v3": "deepseek-r1-distill-qwen-7b",
    "deepseek-v3-3bit": "deepseek-r1-distill-qwen-7b",
    "deepseek-r1": "deepseek-r1-distill-llama-8b",
    "deepseek-r1-3bit": "deepseek-r1-distill-llama-8b",
    "deepseek-r1-distill-qwen-1.5b": None,
    "deepseek-r1-distill-qwen-1.5b-3bit": None,
    "deepseek-r1-distill-qwen-1.5b-6bit": None,
    "deepseek-r1-distill-qwen-1.5b-8bit": None,
    "deepseek-r1-distill-qwen-1.5b-bf16": None,
    "deepseek-r1-distill-qwen-7b": "deepseek-r1-distill-qwen-1.5b",
    "deepseek-r1-distill-qwen-7b-3bit": "deepseek-r1-distill-qwen-1.5b",
    "deepseek-r1-distill-qwen-7b-6bit": "deepseek-r1-distill-qwen-1.5b",
    "deepseek-r1-distill-qwen-7b-8bit": "deepseek-r1-distill-qwen-1.5b",
    "deepseek-r1-distill-qwen-7b-bf16": "deepseek-r1-distill-qwen-1.5b",
    "deepseek-r1-distill-qwen-14b": "deepseek-r1-distill-qwen-1.5b",
    "deepseek-r1-distill-qwen-14b-3bit": "deepseek-r1-distill-qwen-1.5b",
    "deepseek-r1-distill-qwen-14b-6bit": "deepseek-r1-distill-qwen-1.5b",
    "deepseek-r1-distill-qwen-14b-8bit": "deepseek-r1-distill-qwen-1.5b",
    "deepseek-r1-distill-qwen-14b-bf16": "deepseek-r1-distill-qwen-1.5b",
    "deepseek-r1-distill-qwen-32b": "deepseek-r1-distill-qwen-7b",
    "deepseek-r1-distill-qwen-32b-3bit": "deepseek-r1-distill-qwen-7b",
    "deepseek-r1-distill-qwen-32b-6bit": "deepseek-r1-distill-qwen-7b",
    "deepseek-r1-distill-qwen-32b-8bit": "deepseek-r1-distill-qwen-7b",
    "deepseek-r1-distill-qwen-32b-bf16": "deepseek-r1-distill-qwen-7b",
    "deepseek-r1-distill-llama-8b": None,
    "deepseek-r1-distill-llama-8b-3bit": None,
    "deepseek-r1-distill-llama-8b-6bit": None,
    "deepseek-r1-distill-llama-8b-8bit": None,
    "deepseek-r1-distill-llama-8b-bf16": None,
    "deepseek-r1-distill-llama-70b": "deepseek-r1-distill-llama-8b",
    "deepseek-r1-distill-llama-70b-3bit": "deepseek-r1-distill-llama-8b",
    "deepseek-r1-distill-llama-70b-6bit": "deepseek-r1-distill-llama-8b",
    "deepseek-r1-distill-llama-70b-8bit": "deepseek-r1-distill-llama-8b",
    "qwen-2.5-0.5b": None,
    "qwen-2.5-1.5b": "qwen-2.5-0.5b",
    "qwen-2.5-3b": "qwen-2.5-0.5b",
    "qwen-2.5-7b": "qwen-2.5-1.5b",
    "qwen-2.5-14b": "qwen-2.5-3b",
    "qwen-2.5-32b": "qwen-2.5-3b",
    "qwen-2.5-72b": "qwen-2.5-14b",
    "qwen-2.5-coder-1.5b": "qwen-2.5-0.5b",
    "qwen-2.5-coder-3b": "qwen-2.5-coder-1.5b",
    "qwen-2.5-coder-7b": "qwen-2.5-coder-1.5b",
    "qwen-2.5-coder-14b": "qwen-2.5-coder-3b",
    "qwen-2.5-coder-32b": "qwen-2.5-coder-3b",
    "qwen-2.5-math-7b": "qwen-2.5-1.5b",
    "qwen-2.5-math-72b": "qwen-2.5-math-7b",
    "gemma2-9b": "gemma-2-2b",
    "gemma2-27b": "gemma-2-2b",
    "phi-3.5-mini": None,
    "phi-4": None,
}
OPTIONS = {
    "llama": {"gamma": 6, "temperature": 1.0, "top_k": 0.9, "lenience": 1.1},
    "qwen": {"gamma": 4, "temperature": 0.8, "top_k": 0.85, "lenience": 1.0},
    "deepseek": {"gamma": 5, "temperature": 1.0, "top_k": 0.9, "lenience": 1.0},
}


@pytest.mark.parametrize(("target", "drafts"), TABLE.items())
def test_the_documents_table(target, drafts):
    family = get_model_family_variants(target)
    assert set(family) == {"family", "variants", "suggested_drafts"}
    assert family["suggested_drafts"] == drafts
    assert {target, *drafts} <= set(family["variants"])
    name = target.split("-")[0]
    assert family["family"] == name
    assert suggest_speculative_config(target) == {
        "target_model_id": target,
        "draft_model_id": drafts[0],
        **OPTIONS[name],
    }


@pytest.mark.parametrize("target", ["gpt-5", "", "my/finetune", "llama-3.1-9b", "./models/thing"])
def test_an_unknown_target_gets_the_defaults_and_no_draft(target):
    expected = {"gamma": 5, "temperature": 1.0, "top_k": 0.9, "lenience": 1.0}
    assert suggest_speculative_config(target) == {"target_model_id": target, "draft_model_id": None, **expected}
    assert get_model_family_variants(target) == {"family": "default", "variants": [], "suggested_drafts": []}


@pytest.mark.parametrize(("target", "draft"), EXO_TEXT_MODELS.items())
def test_every_text_model_of_exo_has_a_suggestion_or_no_smaller_sibling(target, draft):
    assert repository_of(target) is not None
    assert suggest_speculative_config(target)["draft_model_id"] == draft
    for suggested in suggested_drafts(target):
        assert suggested in EXO_TEXT_MODELS or suggested in REPOSITORIES
        if parameters(target) is not None and parameters(suggested) is not None:
            assert parameters(suggested) < parameters(target)
    expected = f"{target}: draft " if draft else f"{target}: no smaller sibling: suffix"
    assert explain_suggestion(target).startswith(expected)


def test_the_suggestion_in_a_line():
    assert explain_suggestion("llama-3.1-8b") == "llama-3.1-8b: draft llama-3.2-1b, then llama-3.2-3b"
    assert explain_suggestion("llama-3.2-1b") == ("llama-3.2-1b: no smaller sibling: suffix drafter")
    assert explain_suggestion("gpt-5") == "gpt-5: not in the registry, so no draft is known: suffix drafter"


def test_llama_3_has_other_tokens_than_its_successors():
    assert suggested_drafts("llama-3-70b") == ("llama-3-8b",)
    later = [target for family in FAMILIES for target, drafts in family.drafts.items() if "llama-3-8b" in drafts]
    assert later == ["llama-3-70b"]


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("Llama-3.1-8B", "llama-3.1-8b"),
        ("mlx-community/Meta-Llama-3.1-8B-Instruct-4bit", "llama-3.1-8b"),
        ("meta-llama/Llama-3.2-1B-Instruct", "llama-3.2-1b"),
        ("llama3.1:8b", "llama-3.1-8b"),
        ("llama_3_1_8b", "llama-3.1-8b"),
        ("Qwen/Qwen2.5-0.5B-Instruct", "qwen-2.5-0.5b"),
        ("qwen2.5-7b-instruct-8bit", "qwen-2.5-7b"),
        ("Qwen3-8B-4bit", "qwen-3-8b"),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", "deepseek-r1-distill-qwen-7b"),
        ("google/gemma-2-9b-it", "gemma-2-9b"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "mistral-7b"),
        ("models/Llama-3.1-8B/", "llama-3.1-8b"),
        ("gemma2-9b", "gemma-2-9b"),
        ("mlx-community/Llama-3.1-Nemotron-70B-Instruct-HF-bf16", "nemotron-70b"),
        ("mlx-community/Meta-Llama-3.1-70B-Instruct-bf16-CORRECTED", "llama-3.1-70b"),
        ("mlx-community/DeepSeek-R1-Distill-Qwen-32B-MLX-8Bit", "deepseek-r1-distill-qwen-32b"),
        ("deepseek-ai/DeepSeek-V2.5", "deepseek-coder-v2.5"),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "llama-3-8b"),
        ("Acme/Other-Model-7B-Instruct", "other-model-7b"),
    ],
)
def test_spellings_of_a_name(spelling, name):
    assert short_name(spelling) == name


@pytest.mark.parametrize(
    "spelling", ["llama-3.2-11b", "llama-3.1-8", "qwen-2.5-70b", "deepseek-r2", "llama-31-8b-coder"]
)
def test_similar_names_are_not_the_same(spelling):
    assert repository_of(spelling) is None


def test_the_registry_is_whole():
    variants = [name for family in FAMILIES for name in family.variants]
    assert len(set(variants)) == len(variants)
    assert set(variants) == set(REPOSITORIES)
    for family in FAMILIES:
        for target, drafts in family.drafts.items():
            assert {target, *drafts} <= set(family.variants)
            assert target not in drafts
            for draft in drafts:
                assert parameters(draft) < parameters(target)
    for name, repository in REPOSITORIES.items():
        assert short_name(name) == name
        assert short_name(repository) == name


def test_drafts_are_ranked_by_predicted_speed():
    assert ranked_drafts("llama-3.1-8b") == ("llama-3.2-1b", "llama-3.2-3b")
    assert ranked_drafts("gpt-5") == ()
    # facts: 8B with a 1B draft at acceptance 0.8 and 5 percent a row, gamma 6: 3.95 / (1 + 6 (0.125 + 0.05))
    assert predicted_speedup("llama-3.1-8b", "llama-3.2-1b") == pytest.approx(1.928, abs=1e-3)
    assert predicted_speedup("phi-4", "phi-4-mini") is None
