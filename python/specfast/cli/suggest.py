"""`specfast suggest`: the drafts and options of a target's family."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ..families import (
    FAMILIES,
    explain_suggestion,
    get_model_family_variants,
    predicted_speedup,
    ranked_drafts,
    repository_of,
    suggest_speculative_config,
)

EPILOG = """examples:
  specfast suggest llama-3.1-8b
  specfast suggest mlx-community/Qwen2.5-7B-Instruct-4bit --json
  specfast suggest                                      all families and their models
"""


def add_parser(commands: Any) -> None:
    """Registers the subcommand."""
    parser = commands.add_parser(
        "suggest",
        help="drafts and options of a model's family",
        description="Suggests drafts and options for a target model, by its name; nothing is downloaded.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    parser.add_argument("target", nargs="?", metavar="TARGET", help="short name, repo id or directory")
    parser.add_argument("--json", action="store_true", help="print a JSON object")


def run(options: argparse.Namespace) -> int:
    """Prints the suggestion, or all families without a target."""
    if options.target is None:
        families = {family.name: list(family.variants) for family in FAMILIES}
        lines = [json.dumps(families)] if options.json else [f"{n}: {', '.join(v)}" for n, v in families.items()]
        print("\n".join(lines))
        return 0
    family, config = get_model_family_variants(options.target), suggest_speculative_config(options.target)
    predicted = {draft: predicted_speedup(options.target, draft) for draft in family["suggested_drafts"]}
    if options.json:
        print(json.dumps({**config, **family, "predicted_speedup": predicted}))
        return 0
    print(f"target {options.target}, family {family['family']}")
    for draft, speedup in predicted.items():
        said = "" if speedup is None else f", {speedup:.1f}x predicted at 0.8 acceptance"
        print(f"  draft {draft} ({repository_of(draft)}){said}")
    print(
        f"  gamma {config['gamma']}, temperature {config['temperature']:g}, top-k threshold {config['top_k']:g}, "
        f"lenience {config['lenience']:g}" + (" (above 1 changes the output law)" if config["lenience"] > 1 else "")
    )
    if predicted:
        best = ranked_drafts(options.target)[0]
        print(f"  specfast generate --model {options.target} --draft-model {best}")
    else:
        print(f"  {explain_suggestion(options.target)}; a draft of the same tokens can be named with --draft-model")
    return 0
