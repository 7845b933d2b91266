"""The Python of the speculative-decoding document, word for word but for where it imports from."""

import contextlib
import io

import specfast
from specfast.families import get_model_family_variants

USAGE = """
from exo.inference.inference_engine import (
    get_inference_engine, 
    suggest_speculative_config,
    get_model_family_variants
)
from exo.download.shard_download import ShardDownloader

# Get suggestions for a target model
target_model = "llama-3.1-8b"
family_info = get_model_family_variants(target_model)
print(f"Suggested drafts: {family_info['suggested_drafts']}")

# Auto-configure
auto_config = suggest_speculative_config(target_model)
print(f"Auto config: {auto_config}")

# Create engine with family models
shard_downloader = ShardDownloader()
engine = get_inference_engine('speculative', shard_downloader, auto_config)

# Check compatibility stats
stats = engine.get_speculation_stats()
print(f"Model compatibility: {stats['model_family_compatibility']}")
"""  # noqa: W291 - as in the document

MONITORING = """
# Monitor family-specific performance
stats = engine.get_speculation_stats()
print(f"Model family compatibility: {stats['model_family_compatibility']}")
print(f"Acceptance rate: {stats['acceptance_rate']:.2f}")

# Adjust models if compatibility issues
if stats['model_family_compatibility'] == 'incompatible':
    # Switch to auto-config
    new_config = suggest_speculative_config(target_model)
    engine.set_models(new_config['target_model_id'], new_config['draft_model_id'])
"""


class ShardDownloader:
    """exo's, which native models do not need."""


def run(snippet, names):
    """Executes a snippet with exo's imports replaced; returns what it printed."""
    lines = snippet.replace("from exo.inference.inference_engine import", "from specfast.inference import")
    lines = lines.replace("from exo.download.shard_download import ShardDownloader", "")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(lines, "document", "exec"), names)
    return printed.getvalue().splitlines()


def test_the_snippets_run():
    names = {"ShardDownloader": ShardDownloader}
    assert run(USAGE, names) == [
        "Suggested drafts: ['llama-3.2-3b', 'llama-3.2-1b']",
        "Auto config: {'target_model_id': 'llama-3.1-8b', 'draft_model_id': 'llama-3.2-3b', 'gamma': 6, "
        "'temperature': 1.0, 'top_k': 0.9, 'lenience': 1.1}",
        "Model compatibility: unknown",
    ]
    assert run(MONITORING, names) == ["Model family compatibility: unknown", "Acceptance rate: 0.00"]


def test_the_last_step_changes_the_models():
    names = {"ShardDownloader": ShardDownloader}
    run(USAGE, names)
    engine = names["engine"]
    engine.set_models("llama-3.1-8b", "qwen-2.5-3b")
    honest = engine.get_speculation_stats
    engine.get_speculation_stats = lambda: {**honest(), "model_family_compatibility": "incompatible"}
    run(MONITORING, names)
    stats = honest()
    assert (stats["target_model"], stats["draft_model"]) == ("llama-3.1-8b", "llama-3.2-3b")


def test_the_names_are_at_the_top_of_the_package_too():
    assert specfast.get_model_family_variants is get_model_family_variants
    assert callable(specfast.get_inference_engine)
    assert callable(specfast.suggest_speculative_config)
