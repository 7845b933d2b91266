"""Laws, draws and the three rules on Metal kernels: the same bits and tokens as the C++ kernels."""

import os
import struct

import numpy as np
import pytest
from metal_launch import empty, program, run
from specfast import _core, metal

FULL = os.environ.get("SPECFAST_FULL") == "1"
ROUNDS = 10_000 if FULL else 1_000  # of each rule
LAW = [
    metal.law_weights(M=1, V=1, limit=1, temperature=1.0),
    metal.law_scales(M=1, V=1, limit=1),
    metal.law_rows(M=1, V=1),
]
BINARY64 = """
kernel void binary64(device const ulong* a [[buffer(0)]], device const ulong* b [[buffer(1)]],
                     device ulong* out [[buffer(2)]], constant int* dims [[buffer(3)]],
                     uint3 group [[threadgroup_position_in_grid]], uint lane [[thread_index_in_simdgroup]]) {
  const int n = dims[0], i = int(group.x) * 32 + int(lane);
  if (i >= n) return;
  out[i] = b64_add(a[i], b[i]);
  out[n + i] = b64_multiply(a[i], b[i]);
  out[2 * n + i] = b64_divide(a[i], b[i]);
  out[3 * n + i] = b64_less(a[i], b[i]) ? 1 : 0;
  out[4 * n + i] = b64_float_bits(a[i]);
  out[5 * n + i] = b64_of(as_type<float>(uint(b[i])));
  out[6 * n + i] = b64_of_uint(a[i]);
}
"""


def law(logits, temperature, limit, mode="plain", schedule=0):
    """p of logits (M, V), through the three launches."""
    M, V = logits.shape
    best = np.zeros((M, 4), np.float32)
    best[:, 0] = logits[:, :limit].max(-1)
    weights, masses = empty((M, V), "f32"), np.full((M, -(-V // 256)), 7, np.uint64)
    scales, p = np.zeros(M, np.uint64), empty((M, V), "f32")
    how = {"mode": mode, "schedule": schedule}
    run(metal.law_weights(M=M, V=V, limit=limit, temperature=temperature), logits, best, weights, masses, **how)
    run(metal.law_scales(M=M, V=V, limit=limit), masses, scales, **how)
    run(metal.law_rows(M=M, V=V), weights, scales, p, **how)
    return p


def verify(p, q, tokens, settings, mode="plain", schedule=0):
    """(tau, next token) of the three launches."""
    gamma, V = settings.gamma, settings.vocab
    kernels = tuple(
        launch.kernel for launch in (metal.verify_scan(), metal.verify_masses(gamma=gamma, V=V), metal.verify_pick())
    )
    prefixes, masses = np.full(gamma + 1, 7, np.uint64), np.full((gamma + 1, -(-V // 256)), 7, np.uint64)
    held = np.zeros(max(gamma, 8), np.int32)
    held[:gamma] = tokens
    drafts = q if q is not None else np.zeros(1, np.float32)
    out, packed, how = (
        np.full(8, -7, np.int32),
        settings.array(),
        {"mode": mode, "schedule": schedule, "kernels": kernels},
    )
    run(metal.verify_scan(), p, drafts, held, packed, prefixes, **how)
    run(metal.verify_masses(gamma=gamma, V=V), p, drafts, held, packed, prefixes, masses, **how)
    run(metal.verify_pick(), p, drafts, held, packed, prefixes, out, masses, **how)
    return int(out[0]), int(out[1])


def random_round(rng, gamma, V, Vq, sharp=2.0):
    """Laws of target and draft that resemble each other, and tokens drawn from the draft's."""
    base = rng.normal(0, sharp, (gamma + 1, V))
    logits = base.astype(np.float32)
    p = _core.law_rows(
        logits, _core.Law(temperature=float(rng.uniform(0.5, 1.5)), top_k=int(rng.choice([0, 0, V // 3 + 1])))
    )
    if gamma == 0:
        return p, np.zeros((0, Vq), np.float32), np.zeros(0, np.int32)
    drafts = (base[:gamma, :Vq] + rng.normal(0, 0.7, (gamma, Vq))).astype(np.float32)
    q = _core.law_rows(drafts, _core.Law())
    tokens = np.array([_core.sample_token(row, float(rng.uniform())) for row in q], np.int32)
    return p, q, tokens


def native_draws(seed, round_, gamma):
    return np.array([_core.uniform(seed, round_, i, 1) for i in range(gamma)] + [_core.uniform(seed, round_, 0, 2)])


def test_binary64_arithmetic():
    import metal_emulator

    rng, n = np.random.default_rng(1), 20_000
    a, b = (rng.choice([-1, 1], n) * np.exp(rng.normal(0, 20, n)) for _ in range(2))
    near = n // 2
    b[:near] = -a[:near] * (1 + rng.integers(-9, 9, near) * 2.0 ** -rng.integers(1, 53, near))  # cancels
    a[-4:], b[-4:] = (0.0, -0.0, 0.5, 0.0), (0.0, 0.0, -0.5, -0.0)
    floats = rng.integers(0, 1 << 32, n, dtype=np.uint64)
    source = metal.source("verify_tokens") + BINARY64
    compiled = metal_emulator.compile(source)
    bits_a, bits_b = a.view(np.uint64), b.view(np.uint64)
    grid = (-(-n // 32), 1, 1)

    def outputs(x, y):
        out = np.zeros((7, n), np.uint64)
        compiled.run("binary64", grid, (32, 1, 1), [x, y, out, np.array([n], np.int32)])
        return out

    out = outputs(bits_a, bits_b)
    with np.errstate(all="ignore"):
        assert np.array_equal(out[0], (a + b).view(np.uint64))
        assert np.array_equal(out[1], (a * b).view(np.uint64))
        divisible = b != 0
        assert np.array_equal(out[2][divisible], (a / b).view(np.uint64)[divisible])
        assert np.array_equal(out[3], (a < b).astype(np.uint64))
        assert np.array_equal(out[4], a.astype(np.float32).view(np.uint32))
        assert np.array_equal(out[6], bits_a.astype(np.float64).view(np.uint64))
        small = np.exp(rng.normal(-95, 8, n))  # subnormal floats among them
        assert np.array_equal(outputs(small.view(np.uint64), floats)[4], small.astype(np.float32).view(np.uint32))
        wide = outputs(bits_a, floats)[5]
        values = floats.astype(np.uint32).view(np.float32)
        assert np.array_equal(wide[np.isfinite(values)], values.astype(np.float64).view(np.uint64)[np.isfinite(values)])


@pytest.mark.parametrize(("M", "V", "limit"), [(1, 5, 5), (3, 1000, 999), (2, 4097, 4097), (1, 140_000, 139_999)])
@pytest.mark.parametrize("temperature", [1.0, 0.37])
def test_laws_have_the_bits_of_the_native_ones(M, V, limit, temperature):
    logits = np.random.default_rng(V).normal(0, 4, (M, V)).astype(np.float32)
    logits[0, V // 2] = -np.inf
    wanted = _core.law_rows(logits, _core.Law(temperature=temperature, vocab_limit=limit), isa="scalar")
    assert np.array_equal(law(logits, temperature, limit, schedule=M), wanted)


@pytest.mark.parametrize("rule", ["token", "block", "certain"])
def test_verify_tokens_gives_the_native_tokens(rule):
    rng, seen = np.random.default_rng(len(rule)), []
    for round_ in range(ROUNDS):
        gamma, V = int(rng.integers(0, 6)), int(rng.choice([3, 12, 70, 300]))
        Vq = max(1, V - int(rng.integers(0, 3)))
        seed = int(rng.integers(0, 1 << 63))
        lenience = float(rng.choice([1.0, 0.6, 1.7])) if rule != "block" else 1.0
        p, q, tokens = random_round(rng, gamma, V, Vq, sharp=float(rng.choice([0.3, 2.0])))
        settings = metal.VerifySettings(
            gamma,
            V,
            0 if rule == "certain" else Vq,
            rule="block" if rule == "block" else "token",
            seed=seed,
            round=round_,
            lenience=lenience,
        )
        drafts = None if rule == "certain" else q
        found = verify(p, drafts, tokens, settings, schedule=round_ % 7)
        native_rule = "block" if rule == "block" else "token"
        wanted = _core.verify_tokens(
            p, drafts, tokens, native_draws(seed, round_, gamma), lenience, isa="scalar", rule=native_rule
        )
        assert found == wanted, (round_, gamma, V)
        seen.append((found[0], gamma))
    assert {tau for tau, _ in seen} >= set(range(4))  # keeping and rejecting have both been met


@pytest.mark.parametrize("mode", ["plain", "address", "thread"])
@pytest.mark.parametrize("rule", ["token", "block"])
def test_verify_tokens_of_a_large_vocabulary(rule, mode):
    V = 140_000 if mode == "plain" else 1_500
    rng = np.random.default_rng(V)
    for round_ in range(5 if mode != "thread" or FULL else 2):
        p, q, tokens = random_round(rng, 3, V, V - 7)
        settings = metal.VerifySettings(3, V, V - 7, rule=rule, seed=5, round=round_)
        found = verify(p, q, tokens, settings, mode=mode, schedule=round_)
        assert found == _core.verify_tokens(p, q, tokens, native_draws(5, round_, 3), isa="scalar", rule=rule)


def test_what_has_no_mass():
    p = np.array([[0.25, 0.75, 0], [1, 0, 0]], np.float32)
    same = p[:1].copy()
    for lenience in (1.0, 0.5):
        settings = metal.VerifySettings(1, 3, 3, seed=3, round=11, lenience=lenience)
        wanted = _core.verify_tokens(p, same, np.array([2], np.int32), native_draws(3, 11, 1), lenience)
        assert verify(p, same, np.array([2]), settings) == wanted  # nothing is left of p - q: p itself
    nothing = np.zeros((1, 3), np.float32)
    assert verify(nothing, None, np.zeros(0), metal.VerifySettings(0, 3)) == (0, -1)
    nothing[0, 1] = np.nan
    assert verify(nothing, None, np.zeros(0), metal.VerifySettings(0, 3)) == (0, -1)


def test_a_draft_draws_its_token():
    rng, V = np.random.default_rng(2), 500
    (q,), _, _ = random_round(rng, 0, V, V)
    for i in range(50):
        settings = metal.VerifySettings(0, V, seed=9, round=4, purpose="draft", position=i)
        assert verify(q[None], None, np.zeros(0), settings)[1] == _core.sample_token(q, _core.uniform(9, 4, i, 0))


def couple(weights, tokens, seed, position, mode="plain", schedule=0):
    M, V = weights.shape
    state, held = np.zeros(8, np.int32), np.zeros(16, np.int32)
    state[0], held[2 : 1 + M] = position - 1, tokens
    settings = metal.VerifySettings(M - 1, V, rule="coupled", seed=seed, first=2, slot=4)
    leaders, out = np.zeros((M, -(-V // 4096), 3), np.uint32), np.full(8, -7, np.int32)
    kernels = (metal.couple_rows(M=M, V=V).kernel, metal.couple_pick().kernel)
    how = {"mode": mode, "schedule": schedule, "kernels": kernels}
    run(metal.couple_rows(M=M, V=V), weights, state, settings.array(), leaders, **how)
    run(metal.couple_pick(), leaders, held, settings.array(), out, **how)
    return int(out[3]), int(out[4])


@pytest.mark.parametrize("V", [7, 200, 9000])
def test_couple_tokens_gives_the_native_tokens(V):
    rng, taus = np.random.default_rng(V), set()
    for round_ in range(ROUNDS if V < 1000 else max(ROUNDS // 100, 5)):
        gamma, seed, position = int(rng.integers(0, 5)), int(rng.integers(0, 1 << 63)), int(rng.integers(1, 1 << 30))
        p, q, _ = random_round(rng, gamma, V, V)
        tokens = [
            _core.couple_tokens(row[None], np.zeros(0, np.int32), seed, position + i)[1] for i, row in enumerate(q)
        ]
        found = couple(p, tokens, seed, position, schedule=round_ % 7)
        assert found == _core.couple_tokens(p, np.array(tokens, np.int32), seed, position, isa="scalar")
        taus.add(found[0])
    assert len(taus) > 2


@pytest.mark.parametrize("mode", ["address", "thread"])
def test_couple_tokens_sanitized(mode):
    p, _, _ = random_round(np.random.default_rng(8), 2, 600, 600)
    for schedule in range(5):
        found = couple(p, [1, 2], 77, 1000, mode=mode, schedule=schedule)
        assert found == _core.couple_tokens(p, np.array([1, 2], np.int32), 77, 1000)


@pytest.mark.parametrize("mode", ["address", "thread"])
def test_laws_sanitized(mode):
    logits = np.random.default_rng(4).normal(0, 3, (1, 700)).astype(np.float32)
    wanted = _core.law_rows(logits, _core.Law(temperature=0.8, vocab_limit=690))
    for schedule in range(5):
        assert np.array_equal(law(logits, 0.8, 690, mode, schedule), wanted)


def test_verify_greedy():
    best, tokens, out = np.zeros((4, 4), np.float32), np.zeros(16, np.int32), np.zeros(8, np.int32)
    best[:, 1] = 5, 6, 1 << 23, 8
    for drafted, wanted in (((5, 6, 1 << 23), (3, 8)), ((5, 7, 7), (1, 6)), ((1, 6, 7), (0, 5))):
        tokens[2:5] = drafted
        run(metal.verify_greedy(), best, tokens, metal.VerifySettings(3, 9, first=2).array(), out)
        assert (out[0], out[1]) == wanted


def test_settings_are_where_the_kernels_read_them():
    array = metal.VerifySettings(2, 3, 4, "block", 0x1_0000_0005, 6, 0.5, "draft", 7, 8, 9).array()
    assert array[:8].tolist() == [2, 3, 4, 1, 5, 1, 6, 0]
    assert struct.unpack("<d", array[8:10].tobytes()) == (0.5,)
    assert array[10:].tolist() == [0, 7, 8, 9, 1, 0]


def test_all_kernels_of_a_file_compile_together():
    assert {"law_weights", "law_scales", "law_rows"} <= set(program([launch.kernel for launch in LAW]).kernels)
