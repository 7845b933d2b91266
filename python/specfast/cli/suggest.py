"""`specfast suggest`: the drafts and options of a target's family."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ..families import FAMILIES, get_model_family_variants, repository_of, suggest_speculative_config


def add_parser(commands: Any) -> None:
    """Registers the subcommand."""
    parser = commands.add_parser("suggest", help="drafts and options of a model's family", description="Suggests drafts and options for a target model.")
    parser.set_defaults(run=run)
    parser.add_argument("target", nargs="?", help="for example llama-3.1-8b; without it, the families are listed")
    parser.add_argument("--json", action="store_true", help="print a JSON object")


def run(options: argparse.Namespace) -> int:
    """Prints the suggestion."""
    if options.target is None:
        families = {family.name: list(family.variants) for family in FAMILIES}
        if options.json:
            print(json.dumps(families))
        else:
            for name, variants in families.items():
                print(f"{name}: {', '.join(variants)}")
        return 0
    info, config = get_model_family_variants(options.target), suggest_speculative_config(options.target)
    if options.json:
        print(json.dumps({**info, "config": config}))
        return 0
    print(f"target {options.target}: family {info['family']}")
    for draft in info["suggested_drafts"]:
        print(f"  draft {draft} ({repository_of(draft)})")
    if not info["suggested_drafts"]:
        print("  no smaller sibling is known: plain decoding, or name a draft with --draft-model")
    print(f"  gamma {config['gamma']}, temperature {config['temperature']}, top-k threshold {config['top_k']}, lenience {config['lenience']}")
    return 0
