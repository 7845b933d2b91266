"""`--speculative-target-engine mlx`: exo's requests on specfast's MLX host, with the tokens of plain decoding."""

import asyncio
import json

import pytest

pytest.importorskip("mlx_lm")

from exo_home import SPECIAL, deep_decoder, drafting
from exo_session import DRAFT, GREEDY, OTHER, TARGET, Reference, Session, fake_exo, is_home, repository
from specfast import ContextFullError
from specfast.exo import hosts
from specfast.exo.models import ENGINE_CLASSES
from tiny_directories import byte_level

MLX = ENGINE_CLASSES["mlx"]
TEXTS = ["def main(path):", "  a  b\tc\n"]
PAIR = {"target_model": TARGET, "draft_model": DRAFT, "target_engine": "mlx", "gamma": 4}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("exo")
    with pytest.MonkeyPatch.context() as patch, fake_exo(hook=False):
        home = is_home(root, patch)
        decoder, tokenizer = deep_decoder(3), byte_level(*SPECIAL, start=None)
        home.add(repository(TARGET, MLX), decoder, tokenizer=tokenizer, max_context=1024)
        for engine in ENGINE_CLASSES.values():
            draft = drafting(decoder, noise=0.2)
            home.add(repository(DRAFT, engine), draft, tokenizer=tokenizer, max_context=1024)
    return root


@pytest.fixture
def home(checkpoints, monkeypatch):
    with fake_exo():
        yield is_home(checkpoints, monkeypatch)


def plain(home, text, **options):
    model = Reference(home.folder(repository(TARGET, MLX)), None)
    return model(text, disabled=True, **options)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"draft_engine": "tinygrad"},
        {"drafter": "suffix", "draft_model": None},
        {"gamma": "auto"},
        {"disabled": True},
    ],
    ids=str,
)
def test_tokens_are_those_of_plain_greedy_decoding(home, text, more):
    session = Session({**PAIR, **GREEDY, **more})
    assert asyncio.run(session.ask(text)) == plain(home, text, **GREEDY)
    stats = session.stats
    assert stats["models"][TARGET]["engine"] == "mlx"
    assert stats["precision"] == "f32"
    assert (stats["drafted"] == 0) == ("disabled" in more)
    if not more:
        assert stats["target_passes"] < 24
        assert stats["model_family_compatibility"] == "compatible"


def test_a_seed_gives_the_text_of_plain_decoding_under_the_coupled_rule(home):
    texts = [
        asyncio.run(Session({**PAIR, "rule": "coupled", **more}).ask(TEXTS[0], temperature=1.0, seed=5))
        for more in ({}, {"disabled": True}, {"target_engine": None})
    ]
    assert texts[0] == texts[1] == texts[2]


def test_requests_side_by_side_and_their_own_options(home):
    session = Session({**PAIR, **GREEDY})
    assert asyncio.run(session.ask_all(TEXTS)) == [plain(home, text, **GREEDY) for text in TEXTS]
    again = Session({**PAIR, **GREEDY})
    assert asyncio.run(again.ask(TEXTS[0], max_tokens=5)) == plain(home, TEXTS[0], **GREEDY)[:5]


def test_a_prompt_too_long_is_an_error(home):
    with pytest.raises(ContextFullError, match="1024"):
        asyncio.run(Session(PAIR).ask("x = 1\n" * 900))


def test_without_mlx_its_checkpoints_run_natively(home, monkeypatch, capfd):
    monkeypatch.setattr(hosts.importlib.util, "find_spec", lambda name: None)
    session = Session({**PAIR, **GREEDY})
    assert "native, from mlx's checkpoints" in capfd.readouterr().err
    assert asyncio.run(session.ask(TEXTS[0])) == plain(home, TEXTS[0], **GREEDY)
    assert session.stats["models"][TARGET]["engine"] == "native"


def test_an_architecture_that_the_native_decoder_does_not_know_speculates(home, checkpoints):
    """Gemma, which mlx-lm runs in its own layers: the text so far is copied."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models import gemma

    folder = home.folder(repository(OTHER, MLX))
    config = {
        "model_type": "gemma", "architectures": ["GemmaForCausalLM"], "hidden_size": 32, "num_hidden_layers": 2, "head_dim": 16,
        "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-5, "vocab_size": 320,
        "max_position_embeddings": 512, "eos_token_id": 301,
    }  # fmt: skip
    mx.random.seed(1)
    model = gemma.Model(gemma.ModelArgs.from_dict(config))
    (folder / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text((home.folder(repository(TARGET, MLX)) / name).read_text())
    tokens = {}
    for disabled in (True, False):
        config = {
            "target_model": OTHER,
            "target_engine": "mlx",
            "drafter": "suffix",
            "gamma": 3,
            **GREEDY,
            "disabled": disabled,
        }
        session = Session(config)
        tokens[disabled] = asyncio.run(session.ask("a b a b a b", model=OTHER))
        assert session.stats["models"][OTHER]["engine"] == "mlx"
        assert (session.stats["drafted"] == 0) == disabled
    assert tokens[True] == tokens[False]
    assert session.stats["host_requests"] == 0
