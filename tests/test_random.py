"""The counter-based random streams: known answers, uniformity, independence."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracle import philox
from oracle.chi_square import excess
from specfast import _core

WORD = st.integers(0, 2**32 - 1)
DRAFT, ACCEPT, RESIDUAL = 0, 1, 2

# Random123's kat_vectors for philox4x32 with 10 rounds: counter, key, result.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_known_answers(counter, key, words):
    assert philox.philox(counter, key) == words
    round_, seed = counter[0] | counter[1] << 32, key[0] | key[1] << 32
    assert _core.uniform(seed, round_, counter[2], counter[3]) == ((words[0] << 32 | words[1]) >> 11) * 2.0**-53


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), WORD, WORD)
def test_equals_the_oracle_and_lies_in_the_unit_interval(seed, round_, position, purpose):
    u = _core.uniform(seed, round_, position, purpose)
    assert u == philox.uniform(seed, round_, position, purpose)
    assert 0 <= u < 1


STREAMS = {
    "round": lambda i, key: _core.uniform(key, i, 0, DRAFT),
    "seed": lambda i, key: _core.uniform(i, key, 0, DRAFT),
    "position": lambda i, key: _core.uniform(key, 1, i, DRAFT),
}


@pytest.mark.parametrize("stream", STREAMS)
def test_uniform_along_every_coordinate(stream):
    draws = np.array([STREAMS[stream](i, 7) for i in range(20_000)])
    assert excess(np.histogram(draws, 64, (0, 1))[0], np.ones(64)) < 1


@pytest.mark.parametrize("purpose", [ACCEPT, RESIDUAL])
@pytest.mark.parametrize("shift", [0, 1])
def test_purposes_and_neighbours_are_independent(purpose, shift):
    n = 20_000
    a = np.array([_core.uniform(3, i, 2, DRAFT) for i in range(n)])
    b = np.array([_core.uniform(3, i + shift, 2, purpose) for i in range(n)])
    pairs = np.histogram2d(a, b, 8, [(0, 1), (0, 1)])[0]
    assert excess(pairs, np.ones((8, 8))) < 1


def test_a_reused_stream_is_caught():
    a = np.array([_core.uniform(3, i, 2, DRAFT) for i in range(20_000)])
    pairs = np.histogram2d(a, a, 8, [(0, 1), (0, 1)])[0]
    assert excess(pairs, np.ones((8, 8))) > 1


@pytest.mark.parametrize("bad", [(-1, 0, 0, 0), (2**64, 0, 0, 0), (0, -1, 0, 0), (0, 0, 2**32, 0)])
def test_keys_out_of_range_are_refused(bad):
    with pytest.raises((TypeError, OverflowError)):
        _core.uniform(*bad)
