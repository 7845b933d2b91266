"""A model cut into ranges of layers: every bit is that of the whole model, whoever runs which range."""

import itertools
import json

import numpy as np
import pytest
from random_checkpoints import ARCHITECTURES, write_checkpoint
from specfast import ConfigurationError, ModelFormatError, UnsupportedModelError, _core
from specfast.checkpoint import load_model, open_weights, weight_bytes
from specfast.convert import convert
from specfast.errors import ContextFullError, ShapeError
from specfast.safetensors_file import write_safetensors
from tiny_directories import write_model
from tiny_models import random_decoder

CUTS = [(2,), (1, 3), (1, 2, 3)]
PROMPT = [int(token) for token in np.random.default_rng(3).integers(0, 96, 37)]
LAWS = {"greedy": _core.Law(temperature=0.0), "coupled": _core.Law(temperature=1.0, top_p=0.95)}


def ranges_of(cut, total=4):
    edges = (0, *cut, total)
    return [range(a, b) for a, b in itertools.pairwise(edges)]


def as_rows(tokens):
    return np.asarray(tokens, dtype=np.int32)


def drafted(tokens):
    proposal = _core.Proposal()
    proposal.set_tokens(as_rows(tokens))
    return proposal


class Ring:
    """Ranges of one model, and their caches."""

    def __init__(self, directory, cut, **options):
        self.models = [load_model(directory, layers=layers, **options).model for layers in ranges_of(cut)]
        self.caches = [_core.Cache(model) for model in self.models]

    def rows(self, tokens):
        rows = as_rows(tokens)
        for model, cache in zip(self.models[:-1], self.caches[:-1], strict=True):
            rows = model.forward_range(cache, rows)
        return rows

    def verify(self, pending, proposal, law, seed, rule):
        rows = self.rows([*pending, *proposal.tokens])
        return self.models[-1].verify_range(self.caches[-1], rows, proposal, law, seed, 0, rule)

    def commit(self, n):
        for cache in self.caches:
            cache.commit(n)


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """Four layers, one of them with a window."""
    directory = tmp_path_factory.mktemp("deep")
    write_model(directory, random_decoder(7, V=96, layers=4, tied=False))
    return directory


def texts(directory, cut, law, *, precision=None, kv_bits=None):
    """Twelve rounds of four drafted tokens, some right and some wrong, by the whole model and by ranges of it."""
    whole = load_model(directory, precision=precision, kv_bits=kv_bits).model
    cache = _core.Cache(whole)
    ring = Ring(directory, cut, precision=precision, kv_bits=kv_bits)
    rng = np.random.default_rng(1)
    rule = "coupled" if law.temperature else "token"
    told, pending, taus = [], PROMPT, set()
    for round_ in range(12):
        guess = whole.verify(cache, as_rows(pending), drafted([]), law, 1.0, 5, 0, rule).next_token
        proposal = drafted([guess if round_ % 3 else (guess + 1) % 96, *rng.integers(0, 96, 3)])
        cache.rollback()
        expected = whole.verify(cache, as_rows(pending), proposal, law, 1.0, 5, 0, rule)
        found = ring.verify(pending, proposal, law, 5, rule)
        assert (found.tau, found.next_token) == (expected.tau, expected.next_token)
        kept = len(pending) + found.tau
        cache.commit(kept)
        ring.commit(kept)
        taus.add(found.tau)
        pending = [found.next_token]
        told.append(found.next_token)
    lengths = {each.length for each in [cache, *ring.caches]}
    assert len(lengths) == 1
    bytes_of_whole = [cache.kv_bytes(layer).tobytes() for layer in range(whole.layers)]
    pieces = [
        each.kv_bytes(i).tobytes() for m, each in zip(ring.models, ring.caches, strict=True) for i in range(m.layers)
    ]
    assert pieces == bytes_of_whole
    assert len(taus) > 1
    return told


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("law", LAWS.values(), ids=list(LAWS))
def test_verdicts_and_caches_are_those_of_the_whole(deep, cut, law):
    assert len(set(texts(deep, cut, law))) > 3


@pytest.mark.parametrize("precision", ["int8", "bf16"])
def test_quantised_weights_and_keys_in_8_bits(deep, tmp_path, precision):
    convert(deep, tmp_path / "q4", bits=4, group_size=32)
    texts(tmp_path / "q4", (1, 3), LAWS["coupled"], precision=precision, kv_bits=8)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture(tmp_path, name):
    write_checkpoint(tmp_path, name, dtype="BF16")
    whole = load_model(tmp_path).model
    parts = [load_model(tmp_path, layers=range(i, i + 1)).model for i in range(2)]
    expected = whole.verify(_core.Cache(whole), as_rows(PROMPT), drafted([1, 2]), LAWS["greedy"], 1.0, 0, 0)
    rows = parts[0].forward_range(_core.Cache(parts[0]), as_rows([*PROMPT, 1, 2]))
    found = parts[1].verify_range(_core.Cache(parts[1]), rows, drafted([1, 2]), LAWS["greedy"], 0, 0)
    assert (found.tau, found.next_token) == (expected.tau, expected.next_token)
    spoilt = rows + np.float32(1.0) * (np.arange(128) == 3)
    other = parts[1].verify_range(_core.Cache(parts[1]), -spoilt, drafted([1, 2]), LAWS["greedy"], 0, 0)
    assert other.next_token != expected.next_token  # the rows do decide


def test_a_range_reads_its_own_files_only(tmp_path):
    write_checkpoint(tmp_path, "llama-untied")
    tensors = open_weights(tmp_path)
    files = {name: name.split(".")[2] if ".layers." in name else name.split(".")[-2] for name in tensors}
    for part in set(files.values()):
        write_safetensors(tmp_path / f"{part}.safetensors", {n: tensors[n] for n in tensors if files[n] == part})
    weight_map = {name: f"{part}.safetensors" for name, part in files.items()}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    first = {name for name in files if ".layers.0." in name or "embed" in name}
    assert set(open_weights(tmp_path, range(1), 2)) == first
    for part in ("1", "norm", "lm_head"):
        (tmp_path / f"{part}.safetensors").unlink()
    load_model(tmp_path, layers=range(1))
    with pytest.raises(ModelFormatError, match="missing"):
        load_model(tmp_path, layers=range(1, 2))
    with pytest.raises(ModelFormatError, match="missing"):
        load_model(tmp_path)


def test_bytes_of_ranges_are_those_of_the_whole(deep):
    assert sum(weight_bytes(deep, layers, 4) for layers in ranges_of((1, 3))) == weight_bytes(deep)


def test_what_a_range_cannot_do(deep):
    ring = Ring(deep, (2,))
    first, last = ring.models
    a, b = ring.caches
    rows = first.forward_range(a, as_rows(PROMPT))
    for wrong in (
        lambda: first.forward(a, as_rows([1])),
        lambda: last.forward(b, as_rows([1])),
        lambda: first.verify(a, as_rows([1]), None, LAWS["greedy"], 1.0, 0, 0),
        lambda: first.draft_early(a, as_rows([1]), 2, 1, LAWS["greedy"], 0, 0, _core.Proposal()),
        lambda: first.forward_range(a, rows),
        lambda: last.forward_range(b, as_rows([1])),
        lambda: last.forward_range(b, rows),
        lambda: first.verify_range(a, rows, drafted([]), LAWS["greedy"], 0, 0),
        lambda: first.forward_range(a, as_rows([96])),
        lambda: last.verify_range(b, rows[:, :-1].copy(), drafted([]), LAWS["greedy"], 0, 0),
        lambda: last.verify_range(b, rows[:2], drafted([1, 2]), LAWS["greedy"], 0, 0),
    ):
        with pytest.raises(ShapeError):
            wrong()
    assert (a.length, a.provisional, b.length, b.provisional) == (0, 0, 0, 0)  # verifying begins by a rollback
    small = _core.Cache(last, 16)
    with pytest.raises(ContextFullError):
        last.verify_range(small, rows, drafted([]), LAWS["greedy"], 0, 0)
    assert small.provisional == 0


def test_ranges_a_model_does_not_have(deep, tmp_path):
    for layers in (range(5), range(2, 2), range(-1, 2)):
        with pytest.raises(ConfigurationError, match="among the 4"):
            load_model(deep, layers=layers)
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(64))
    with pytest.raises((UnsupportedModelError, ModelFormatError)):
        load_model(tmp_path / "model.gguf", layers=range(1))
