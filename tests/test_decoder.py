"""A row's logits are the same bits for every number of rows, prefilled or decoded, and every number of threads."""

import numpy as np
import pytest
from specfast import _core
from specfast.bench.random_model import QUANTS, random_model
from specfast.bench.shapes import Shape
from tiny_models import native, quantised, random_decoder

ISAS = _core.build_info()["isas_supported"]


@pytest.fixture(autouse=True)
def _threads():
    before = _core.num_threads()
    yield
    _core.set_num_threads(before)


def models(isa):
    decoder = random_decoder(11, V=70, hidden=64, heads=4, kv_heads=2, architecture="qwen2")
    yield native(decoder, isa=isa)
    decoder.layers[1].window = 33
    yield native(decoder, isa=isa, precision="bf16", kv_bits=8)
    for bits in (4, 8):
        _, build = quantised(random_decoder(12, V=70, hidden=128, heads=4, kv_heads=2, tied=False), bits, 64)
        yield build("int8", isa)


@pytest.mark.parametrize("isa", ISAS)
def test_bits_do_not_depend_on_rows_or_threads(isa):
    tokens = np.random.default_rng(0).integers(0, 70, 270).astype(np.int32)  # across a page
    for model in models(isa):
        reference = None
        for threads in (1, 2, 3):
            _core.set_num_threads(threads)
            for M in (1, *range(2, 22), 270) if threads == 2 else (1, 6, 17):
                cache, rows = _core.Cache(model), []
                for first in range(0, len(tokens), M):
                    part = tokens[first : first + M]
                    rows.append(model.forward(cache, part, len(part)))
                    cache.commit(len(part))
                logits = np.concatenate(rows)
                reference = logits if reference is None else reference
                assert np.array_equal(logits, reference), (isa, threads, M)


def test_a_busy_pool_gives_the_same_bits():
    """A second caller at the same time runs on its own thread."""
    from concurrent.futures import ThreadPoolExecutor

    model = next(models(None))
    tokens = np.arange(60, dtype=np.int32)

    def run(_):
        return model.forward(_core.Cache(model), tokens, 60)

    alone = run(0)
    with ThreadPoolExecutor(4) as pool:
        assert all(np.array_equal(alone, other) for other in pool.map(run, range(16)))


def test_a_cache_in_use_is_refused():
    from concurrent.futures import ThreadPoolExecutor

    model = next(models(None))
    cache = _core.Cache(model)
    tokens = np.zeros(400, dtype=np.int32)

    def run(_):
        try:
            return model.forward(cache, tokens, 1) is not None
        except _core.SpecfastError as error:
            return str(error)

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(run, range(2)))
    assert all(r is True or "another thread" in r or "context holds" in r for r in results)


def test_pool_survives_a_fork():
    import os

    model = next(models(None))
    tokens = np.arange(30, dtype=np.int32)
    expected = model.forward(_core.Cache(model), tokens, 30)
    child = os.fork()
    if child == 0:
        same = np.array_equal(model.forward(_core.Cache(model), tokens, 30), expected)
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_wrong_tokens_are_refused():
    model = next(models(None))
    cache = _core.Cache(model)
    for tokens, message in (([70], "vocabulary of 70"), ([-1], "vocabulary of 70"), ([], "at least one")):
        with pytest.raises(_core.ShapeError, match=message):
            model.forward(cache, np.array(tokens, dtype=np.int32), 1 if tokens else 0)
    with pytest.raises(_core.ShapeError, match="another model"):
        next(models(None)).forward(cache, np.array([1], dtype=np.int32), 1)


def test_nan_weights_raise_and_leave_the_cache():
    decoder = random_decoder(1, V=20)
    decoder.layers[0].up[0, 0] = np.nan
    model = native(decoder)
    cache = _core.Cache(model)
    for law in (_core.Law(0.0), _core.Law(1.0)):
        with pytest.raises(_core.NumericalError, match="not finite"):
            model.verify(cache, np.array([1], dtype=np.int32), None, law, 1.0, 0, 0)
        assert (cache.length, cache.provisional) == (0, 0)


@pytest.mark.parametrize("quant", [*(quant for quant in QUANTS if quant.startswith("q")), "bf16"])
def test_packed_weights_give_the_bits_of_those_in_place(quant):
    shape = Shape("ragged", 256, 2, 4, 2, 64, 390 if quant == "bf16" else 384, 1003, True)
    tokens, logits = np.arange(40, dtype=np.int32), []
    for pack in (True, False):
        model = random_model(shape, quant, pack=pack)
        assert pack or model.packed_bytes == 0
        for M in (1, 3, 7, 16):
            cache, rows = _core.Cache(model), []
            for first in range(0, 40, M):
                rows.append(model.forward(cache, tokens[first : first + M], len(tokens[first : first + M])))
                cache.commit(cache.provisional)
            logits.append(np.concatenate(rows))
    assert all(np.array_equal(logits[0], other) for other in logits)
