"""The exo document's tables, commands and messages: docs/exo.md has them, and the code agrees."""

import argparse
import re
import shlex
from pathlib import Path

import pytest
from specfast import SpecfastError, SpeculativeConfig, suggest_speculative_config
from specfast.compatibility import Compatibility
from specfast.families import family_of, get_model_family_variants, predicted_speedup

DOCUMENT = (Path(__file__).parents[1] / "docs" / "exo.md").read_text(encoding="utf-8")

TITLES = """
# Speculative Decoding in exo
## Overview
## How It Works
### Draft-Target Approach (Recommended)
### Early Exit Approach
## Model Family Support
### LLaMA Family
### Qwen Family
### DeepSeek Family
## Usage
### Basic Usage with Model Families
### Advanced Configuration
### Running with Different Model Families
## Configuration Parameters
## Family-Specific Optimizations
### LLaMA Family
### Qwen Family
### Default Family
## Integration Examples
### Python API with Model Families
### Monitoring Model Performance
## Distributed Usage with Model Families
## Performance Guidelines
### Model Size Ratios
### Family Compatibility
### Expected Speedup
## Benchmarking with Families
## Troubleshooting
### Model Incompatibility
### Low Acceptance Rate with Same Family
### Performance Regression
## Future Improvements
## References
"""

PARAMETERS = """
| Parameter | Description | Default | Range |
|-----------|-------------|---------|-------|
| `--speculative-target-model` | Target model ID (e.g., llama-3.1-8b) | None | Any supported model |
| `--speculative-draft-model` | Draft model ID (e.g., llama-3.2-3b) | None | Compatible model or None |
| `--speculative-auto-config` | Auto-configure based on model family | False | - |
| `--speculative-target-engine` | Target inference engine | mlx | mlx, tinygrad |
| `--speculative-draft-engine` | Draft inference engine | None | mlx, tinygrad, None |
| `--speculative-gamma` | Number of speculative tokens | 5 | 1-20 |
| `--speculative-temperature` | Sampling temperature | 1.0 | 0.1-2.0 |
| `--speculative-top-k` | Top-k filtering threshold | 0.9 | 0.1-1.0 |
| `--speculative-lenience` | Acceptance lenience factor | 1.0 | 0.5-2.0 |
| `--disable-speculative` | Disable speculation entirely | False | - |
"""

# name in SpeculativeConfig: flag, default, least, most, below, above
NUMBERS = {
    "gamma": ("--speculative-gamma", 5, 1, 20, 0, 21),
    "temperature": ("--speculative-temperature", 1.0, 0.1, 2.0, 0.09, 2.01),
    "top_k_threshold": ("--speculative-top-k", 0.9, 0.1, 1.0, 0.09, 1.01),
    "lenience": ("--speculative-lenience", 1.0, 0.5, 2.0, 0.49, 2.01),
}

DRAFTS = {
    "llama-3.1-8b": ("llama-3.2-3b", "llama-3.2-1b"),
    "llama-3.1-70b": ("llama-3.2-3b", "llama-3.1-8b"),
    "llama-3.1-405b": ("llama-3.1-8b", "llama-3.2-3b"),
    "llama-3.3-70b": ("llama-3.2-3b", "llama-3.1-8b"),
    "qwen-2.5-7b": ("qwen-2.5-1.5b", "qwen-2.5-0.5b"),
    "qwen-2.5-14b": ("qwen-2.5-3b", "qwen-2.5-1.5b"),
    "qwen-2.5-72b": ("qwen-2.5-14b", "qwen-2.5-7b"),
    "deepseek-v3": ("deepseek-r1-distill-qwen-7b",),
    "deepseek-r1": ("deepseek-r1-distill-llama-8b",),
}

OPTIMISATIONS = """
### LLaMA Family
- **Gamma**: 6 (higher speculation length)
- **Temperature**: 1.0
- **Lenience**: 1.1 (more accepting)
- **Rationale**: LLaMA models have consistent architectures across sizes

### Qwen Family
- **Gamma**: 4 (conservative approach)
- **Temperature**: 0.8
- **Top-k**: 0.85
- **Rationale**: Qwen models benefit from more focused sampling

### Default Family
- **Gamma**: 5
- **Temperature**: 1.0
- **Top-k**: 0.9
- **Lenience**: 1.0
"""
FAMILY_OPTIONS = {
    "llama-3.1-8b": {"gamma": 6, "temperature": 1.0, "top_k": 0.9, "lenience": 1.1},
    "qwen-2.5-7b": {"gamma": 4, "temperature": 0.8, "top_k": 0.85, "lenience": 1.0},
    "deepseek-v3": {"gamma": 5, "temperature": 1.0, "top_k": 0.9, "lenience": 1.0},
    "unheard-of": {"gamma": 5, "temperature": 1.0, "top_k": 0.9, "lenience": 1.0},
}

GUIDELINES = """
### Model Size Ratios
- **Optimal ratio**: 1:2 to 1:4 (draft:target parameters)
  - LLaMA-3B → LLaMA-8B (1:2.7 ratio) ✅
  - LLaMA-3B → LLaMA-70B (1:23 ratio) ⚠️ (may be less efficient)
### Family Compatibility
- ✅ **Same tokenizer**: LLaMA-3.2-3B + LLaMA-3.1-8B
- ✅ **Same architecture**: Qwen-2.5-1.5B + Qwen-2.5-7B
- ❌ **Different families**: LLaMA + Qwen (incompatible)
### Expected Speedup
- **LLaMA family**: 1.5-2.5x speedup
- **Qwen family**: 1.3-2.0x speedup
- **Mixed families**: No speedup (falls back to normal inference)
"""
BANDS = {"llama": "1.5-2.5", "qwen": "1.3-2.0"}

WARNING = """Warning: Models may be incompatible for speculative decoding:
  Target: llama-3.1-8b, Draft: qwen-2.5-3b
  Tokens match: False, Vocab match: False"""

TROUBLESHOOTING = """
**Solution**: Use models from the same family or enable auto-config.
**Possible causes**:
- Draft model too different from target
- Gamma too high for the model pair
- Temperature mismatch
**Solutions**:
1. Use auto-config: `--speculative-auto-config`
2. Try a closer draft model size
3. Reduce gamma: `--speculative-gamma 3`
**Check**:
1. Model family compatibility
2. Acceptance rate > 0.3
3. Draft model is actually smaller
"""

FUTURE_AND_REFERENCES = """
**Multi-draft models**: Use multiple draft models simultaneously
**Adaptive model selection**: Switch draft models based on context
**Cross-family compatibility**: Enable compatible models across families
**Dynamic gamma**: Adjust speculation length based on acceptance rate
**Model-specific fine-tuning**: Optimize draft models for specific targets
[Fast Inference from Transformers via Speculative Decoding](https://arxiv.org/abs/2211.17192) - Original paper with family models
[Accelerating Large Language Model Decoding with Speculative Sampling](https://arxiv.org/abs/2302.01318) - Improved sampling techniques
[Draft & Verify: Lossless Large Language Model Acceleration via Self-Speculative Decoding](https://arxiv.org/abs/2309.08168) - Self-speculation approach
"""

TO_8B = "--inference-engine speculative --speculative-target-model llama-3.1-8b"
TO_QWEN = (
    "--inference-engine speculative --speculative-target-model qwen-2.5-7b --speculative-draft-model qwen-2.5-1.5b "
    "--speculative-auto-config"
)
EIGHT, THREE = {"target_model": "llama-3.1-8b"}, {"draft_model": "llama-3.2-3b"}
QWEN = {"target_model": "qwen-2.5-7b", "draft_model": "qwen-2.5-1.5b", "auto_config": True}
COMMANDS = {
    f"exo {TO_8B} --speculative-auto-config": EIGHT | {"auto_config": True},
    f"exo {TO_8B} --speculative-draft-model llama-3.2-3b": EIGHT | THREE,
    f"exo {TO_QWEN}": QWEN,
    f"exo {TO_8B} --speculative-draft-model llama-3.2-3b --speculative-target-engine mlx --speculative-draft-engine mlx "
    "--speculative-gamma 6 --speculative-temperature 1.0 --speculative-top-k 0.9 --speculative-lenience 1.1": EIGHT
    | THREE
    | {"target_engine": "mlx", "draft_engine": "mlx", "gamma": 6, "temperature": 1.0}
    | {"top_k_threshold": 0.9, "lenience": 1.1},
    "exo --inference-engine speculative --speculative-target-model llama-3.1-70b --speculative-auto-config": {
        "target_model": "llama-3.1-70b",
        "auto_config": True,
    },
    f"exo {TO_8B} --disable-speculative": EIGHT | {"disabled": True},
    f'exo run llama-3.1-8b {TO_8B} --speculative-draft-model llama-3.2-3b --prompt "Explain quantum computing"': EIGHT
    | THREE,
    f"exo run qwen-2.5-7b {TO_QWEN}": QWEN,
    "exo run deepseek-v3 --inference-engine speculative --speculative-target-model deepseek-v3 --speculative-auto-config": {
        "target_model": "deepseek-v3",
        "auto_config": True,
    },
    f"exo {TO_8B} --speculative-draft-model llama-3.2-3b --speculative-gamma 6": EIGHT | THREE | {"gamma": 6},
    f'exo run llama-3.1-8b {TO_8B} --speculative-draft-model llama-3.2-3b --prompt "Write a story" --time': EIGHT
    | THREE,
    'exo run llama-3.1-8b --inference-engine mlx --prompt "Write a story" --time': {},
}


def rows(text):
    return [line for line in text.splitlines() if line]


def in_order(wanted, lines):
    """Whether all wanted lines are among the lines, in their order."""
    rest = iter(lines)
    return all(line in rest for line in wanted)


def documented_commands():
    blocks = re.findall(r"```bash\n(.*?)```", DOCUMENT, re.DOTALL)
    joined = [re.sub(r" *\\\n *", " ", block) for block in blocks]
    return [line for block in joined for line in block.splitlines() if line.startswith("exo ")]


def exo_parser():
    """A parser with the options of exo's own that the document uses, and ours."""
    from specfast.exo.options import add_options

    parser = argparse.ArgumentParser(prog="exo")
    parser.add_argument("command", nargs="?", choices=["run", "eval", "train"])
    parser.add_argument("model_name", nargs="?")
    parser.add_argument("--inference-engine")
    parser.add_argument("--prompt")
    parser.add_argument("--default-temp", type=float, default=0.0)
    add_options(parser)
    return parser


@pytest.mark.parametrize(
    "text", [TITLES, PARAMETERS, OPTIMISATIONS, GUIDELINES, TROUBLESHOOTING], ids=lambda text: rows(text)[0]
)
def test_the_page_has_every_title_and_row_in_order(text):
    assert in_order(rows(text), DOCUMENT.splitlines())


def test_the_page_has_every_suggestion_the_warning_and_the_lists_at_the_end():
    suggestions = [f"- **Target: {target}** → Draft: {', '.join(drafts)}" for target, drafts in DRAFTS.items()]
    assert in_order(suggestions, DOCUMENT.splitlines())
    assert f"```\n{WARNING}\n```" in DOCUMENT
    items = [re.sub(r"^- (\[[ x]\] )?", "", line) for line in DOCUMENT.splitlines()]
    assert in_order(rows(FUTURE_AND_REFERENCES), items)


def test_the_page_has_exactly_the_documents_commands():
    found = documented_commands()
    assert in_order(COMMANDS, found)
    assert set(found) == set(COMMANDS)


def test_the_page_builds_a_downloader_that_exists():
    code = "\n".join(re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL))
    compile(code, "docs/exo.md", "exec")
    assert "new_shard_downloader()" in code
    assert " ShardDownloader()" not in code


@pytest.mark.parametrize("name", NUMBERS)
def test_defaults_and_ranges(name):
    _, default, least, most, below, above = NUMBERS[name]
    assert getattr(SpeculativeConfig(), name) == default
    for value in (least, most):
        assert getattr(SpeculativeConfig(**{name: value}), name) == value
    for value in (below, above):
        with pytest.raises(SpecfastError, match=name):
            SpeculativeConfig(**{name: value})


def test_the_table_says_what_is_asserted_here():
    for flag, default, least, most, *_ in NUMBERS.values():
        (row,) = (line for line in rows(PARAMETERS) if f"`{flag}`" in line)
        assert row.endswith(f"| {default} | {least}-{most} |")


def test_defaults_and_choices_of_the_other_parameters():
    config = SpeculativeConfig()
    assert (config.target_model, config.draft_model, config.draft_engine) == (None, None, None)
    assert (config.auto_config, config.disabled) == (False, False)
    for name in ("target_engine", "draft_engine"):
        for engine in ("mlx", "tinygrad"):
            assert getattr(SpeculativeConfig(**{name: engine}), name) == engine
        with pytest.raises(SpecfastError, match=name):
            SpeculativeConfig(**{name: "torch"})
    assert SpeculativeConfig(draft_engine=None).draft_engine is None


@pytest.mark.parametrize("target", DRAFTS)
def test_suggested_drafts(target):
    assert tuple(get_model_family_variants(target)["suggested_drafts"]) == DRAFTS[target]
    suggestion = suggest_speculative_config(target)
    assert (suggestion["target_model_id"], suggestion["draft_model_id"]) == (target, DRAFTS[target][0])


@pytest.mark.parametrize("target", FAMILY_OPTIONS)
def test_family_options(target):
    suggestion = suggest_speculative_config(target)
    assert {name: suggestion[name] for name in FAMILY_OPTIONS[target]} == FAMILY_OPTIONS[target]


def test_what_is_lossless():
    family = FAMILY_OPTIONS["llama-3.1-8b"]["lenience"]
    assert not SpeculativeConfig(lenience=family).lossless
    assert SpeculativeConfig(lenience=family, temperature=0).lossless
    assert SpeculativeConfig(lenience=1.0).lossless
    assert SpeculativeConfig(top_k_threshold=1.0).greedy


def test_the_warning():
    verdict = Compatibility("incompatible", tokens_match=False, vocab_match=False, vocab=0)
    assert verdict.warning("llama-3.1-8b", "qwen-2.5-3b") == WARNING


def test_the_expected_speed_is_the_models():
    section = DOCUMENT.split("\n## Expected speed\n")[1].split("\n## ")[0]
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if "|" in line][2:]
    native = [(target, draft) for target, drafts in DRAFTS.items() for draft in drafts if "deepseek" not in target]
    assert {(row[0], row[1]) for row in table} == set(native)
    assert len(table) == len(native)
    for target, draft, gamma, *cells in table:
        family = family_of(target)
        assert int(gamma) == family.gamma
        assert cells[:3] == [f"{predicted_speedup(target, draft, acceptance):.2f}" for acceptance in (0.6, 0.7, 0.8)]
        assert cells[-1] == BANDS[family.name]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_parses(command):
    from specfast.exo.options import typed_options

    program, *arguments = shlex.split(command)
    assert program == "exo"
    found = exo_parser().parse_args(arguments)
    assert typed_options(found) == COMMANDS[command]
    assert found.inference_engine == ("speculative" if COMMANDS[command] else "mlx")
    assert found.time == command.endswith("--time")


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_out_of_range_are_usage_errors(name, capsys):
    flag, _, least, most, below, above = NUMBERS[name]
    for value in (least, most):
        exo_parser().parse_args([flag, str(value)])
    for value in (below, above, "much"):
        with pytest.raises(SystemExit) as exit_:
            exo_parser().parse_args([flag, str(value)])
        assert exit_.value.code == 2
        assert flag in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--speculative-target-engine", "--speculative-draft-engine"])
def test_engines_out_of_range_are_usage_errors(flag):
    for engine in ("mlx", "tinygrad"):
        exo_parser().parse_args([flag, engine])
    with pytest.raises(SystemExit) as exit_:
        exo_parser().parse_args([flag, "torch"])
    assert exit_.value.code == 2
