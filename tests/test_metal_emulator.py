"""The Metal emulator: its semantics against NumPy, and every injected fault reported by the mode that is meant to find it."""

import re
from functools import cache
from pathlib import Path

import metal_emulator
import numpy as np
import pytest
from metal_emulator import EmulatorError

HERE = Path(metal_emulator.__file__).parent
SCHEDULES = range(6)
f32 = np.float32


@cache
def program(file: str, mode: str = "plain") -> metal_emulator.Program:
    try:
        return metal_emulator.compile(HERE / file, mode=mode)
    except metal_emulator.EmulatorUnavailableError as missing:
        pytest.skip(str(missing))


def bfloat(x: np.ndarray) -> np.ndarray:
    """Rounds float32 to the nearest bfloat16, ties to even, as its bits."""
    bits = np.asarray(x, f32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def widened(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(f32)


# ---- semantics
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_collectives(schedule):
    x = np.random.default_rng(1).normal(size=32).astype(f32)
    y = np.zeros((12, 32), f32)
    program("semantics.metal").run("collectives", (1, 1, 1), (32, 1, 1), [x, y], schedule)
    lanes = np.arange(32)
    tree = x
    while tree.size > 1:
        tree = tree[: tree.size // 2] + tree[tree.size // 2 :]
    assert (y[0] == tree[0]).all()
    assert (y[1] == x.max()).all()
    assert (y[2] == x.min()).all()
    assert (y[3] == x[::-1]).all()
    assert (y[4] == x[lanes ^ 5]).all()
    assert (y[5] == np.where(lanes < 29, x[(lanes + 3) % 32], x)).all()
    assert (y[6] == np.where(lanes >= 3, x[lanes - 3], x)).all()
    assert (y[7] == x[7]).all()
    np.testing.assert_allclose(y[8], np.cumsum(x.astype(np.float64)), atol=1e-5)
    np.testing.assert_allclose(y[9], np.cumsum(x.astype(np.float64)) - x, atol=1e-5)
    assert (y[10] == sum(1 << int(i) for i in lanes[:16] if x[i] > 0)).all()
    np.testing.assert_allclose(y[11], np.repeat(x.reshape(8, 4).sum(1), 4), atol=1e-6)


def test_simdgroup_matrices():
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(2, 8, 8)).astype(np.float16)
    c, y = rng.normal(size=(8, 8)).astype(f32), np.zeros((8, 8), f32)
    program("semantics.metal").run("matrices", (1, 1, 1), (32, 1, 1), [a, b.T.copy(), c, y])
    expected = c
    for k in range(8):
        expected = expected + a[:, k : k + 1].astype(f32) * b[k : k + 1].astype(f32)
    assert (y == expected).all()


def test_sixteen_bit_floats_round_after_every_operation():
    x = np.random.default_rng(3).normal(size=32).astype(np.float16)
    h, b = np.zeros((4, 32), np.float16), np.zeros((4, 32), np.uint16)
    program("semantics.metal").run("rounding", (1, 1, 1), (32, 1, 1), [x, h, b])
    assert (h[0] == x + (x * x)).all()
    assert (h[1] == (x.astype(f32) / f32(3)).astype(np.float16)).all()
    assert (h[2] == -x).all()
    assert (h[3] == np.maximum(x, np.float16(0.25))).all()
    v = widened(bfloat(x.astype(f32)))
    assert (b[0] == bfloat(v + widened(bfloat(v * v)))).all()
    assert (b[1] == bfloat(v / f32(3))).all()
    assert (b[2] == bfloat(-v)).all()
    assert (b[3] == bfloat(np.maximum(v, f32(0.25)))).all()


def test_positions():
    y = np.zeros((4, 4, 16, 6), np.uint32)  # z, y, x
    program("semantics.metal").run("positions", (2, 1, 2), (8, 4, 2), [y])
    z, row, x = np.meshgrid(range(4), range(4), range(16), indexing="ij")
    index = (x % 8) + 8 * (row + 4 * (z % 2))
    for i, expected in enumerate([x // 8, row // 4, z // 2, index, index // 32, np.full_like(x, 2)]):
        assert (y[..., i] == expected).all()


def test_vectors_and_bits():
    x = np.random.default_rng(4).integers(1, 2**32, 32, dtype=np.uint32)
    y = np.zeros((8, 32), f32)
    program("semantics.metal").run("vectors", (1, 1, 1), (32, 1, 1), [x, y])
    v = np.stack([x >> s & 255 for s in (0, 8, 16, 24)], 1)
    f = v.astype(f32) * f32(0.5) + f32(1)
    assert (y[0] == f[:, 0] * f[:, 2] + f[:, 1] * f[:, 3]).all()
    assert (y[1] == f[:, 3] + f[:, 2]).all()
    assert (y[2] == np.where(v[:, 2] > 100, v[:, 2], f[:, 2])).all()
    assert (y[3] == (v == 255).any(1)).all()
    bits = [f"{int(n):032b}" for n in x]
    assert (y[4] == [b.count("1") + b.index("1") + b[::-1].index("1") for b in bits]).all()
    assert (y[5] == (x & 0x007FFFFF | 0x3F800000).view(f32)).all()
    assert (y[6] == (x >> 5 & 127)).all()
    assert (y[7] == (x.astype(np.uint64) * 0x9E3779B9 >> 48)).all()


def test_bytes_are_counted_per_instruction_and_simdgroup():
    once, shared, twice, packed, y = (
        np.ones(64, f32),
        np.ones(4, f32),
        np.ones(96, f32),
        np.ones(8, np.uint8),
        np.zeros(64, f32),
    )
    buffers = [once, shared, twice, packed, y]
    counters = program("semantics.metal", "count").run("reads", (1, 1, 1), (64, 1, 1), buffers)
    # Two simdgroups: `shared[0]` is one load for each, the nine loads of `twice` run twice, `twice[64 + lane]` is the same for
    # both.
    assert counters.read_bytes == {0: 256, 1: 8, 2: 2 * 9 * 256 + 2 * 128, 3: 8, 4: 256}
    assert counters.unique_read_bytes == {0: 256, 1: 4, 2: 384, 3: 8, 4: 256}
    assert counters.written_bytes == {0: 0, 1: 0, 2: 0, 3: 0, 4: 512}
    assert counters.collectives == 4
    expected = np.zeros(64, f32)
    program("semantics.metal").run("reads", (1, 1, 1), (64, 1, 1), [*buffers[:4], expected])
    assert (y == expected).all()


def test_function_constants_host_names_and_text():
    text = """
    #include <metal_stdlib>
    using namespace metal;
    constant bool negate [[function_constant(3)]];
    template <typename T, int N> [[kernel]] void scale(device T* y [[buffer(0)]], constant int& by [[buffer(1)]], uint i [[thread_position_in_grid]]) {
      y[i] = (negate ? -1 : 1) * N * by * y[i];
    }
    template [[host_name("scale_int_3")]] [[kernel]] decltype(scale<int, 3>) scale<int, 3>;
    """
    y = np.arange(32, dtype=np.int32)
    built = metal_emulator.compile(text, constants={3: True})
    assert built.kernels == ("scale_int_3",)
    built.run("scale_int_3", (1, 1, 1), (32, 1, 1), [y, np.array(5, np.int32)])
    assert (y == -15 * np.arange(32)).all()
    with pytest.raises(metal_emulator.TranslationError, match=r"negate \(3\) has no value"):
        metal_emulator.compile(text)


# ---- faults
def line_of(kernel: str) -> int:
    lines = (HERE / "faults.metal").read_text().splitlines()
    return next(i for i, line in enumerate(lines, 1) if line.endswith(f"// FAULT {kernel}"))


def outcome(
    kernel: str, mode: str, schedule: int = 0, groups: int = 1, buffers: list[np.ndarray] | None = None
) -> bytes:
    y = np.arange(1, 65).astype(f32)
    program("faults.metal", mode).run(kernel, (groups, 1, 1), (64, 1, 1), [y, *(buffers or [])], schedule)
    return y.tobytes()


def report_of(kernel: str, mode: str, schedule: int, groups: int) -> str:
    try:
        outcome(kernel, mode, schedule, groups)
    except EmulatorError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("kernel", "mode", "what", "groups"),
    [
        ("reversed_without_barrier", "thread", "data race", 1),
        ("reversed_with_empty_barrier", "thread", "data race", 1),
        ("race_across_threadgroups", "thread", "data race", 4),
        ("beyond_a_buffer", "address", "heap-buffer-overflow", 1),
        ("beyond_threadgroup_memory", "address", "heap-buffer-overflow", 1),
        ("misaligned", "undefined", "misaligned address", 1),
        ("unset_threadgroup_memory", "memory", "use-of-uninitialized-value", 1),
        ("divergent_reduction", "plain", "is at simd_max, .* thread 0 is at simd_sum", 1),
        ("part_of_a_simdgroup", "plain", "has returned, thread 0 is at simd_sum", 1),
        ("barrier_in_a_branch", "plain", "has returned, thread 0 is at threadgroup_barrier", 1),
    ],
)
def test_a_fault_is_reported_with_its_line(kernel, mode, what, groups):
    reports = [report for schedule in SCHEDULES if (report := report_of(kernel, mode, schedule, groups))]
    assert re.search(what, reports[0])
    assert f"faults.metal:{line_of(kernel)}" in reports[0]


def test_a_register_array_is_not_overrun():
    for mode, what in (("address", "stack-buffer-overflow"), ("undefined", "insufficient space|out of bounds")):
        with pytest.raises(EmulatorError, match=what):
            outcome("beyond_registers", mode, buffers=[np.array([5], np.int32)])
        outcome("beyond_registers", mode, buffers=[np.array([4], np.int32)])


def test_schedules_show_races_and_unset_memory():
    """Without a sanitizer, results that depend on the schedule tell."""
    assert len({outcome("reversed", "plain", s) for s in SCHEDULES}) == 1
    assert len({outcome("reversed_without_barrier", "plain", s) for s in SCHEDULES}) > 1
    assert len({outcome("copied_unset_threadgroup_memory", "plain", s) for s in SCHEDULES}) > 1


@pytest.mark.parametrize("mode", ["address", "thread", "undefined", "memory"])
def test_right_kernels_are_clean_under_every_sanitizer(mode):
    for schedule in (0, 1):
        assert (np.frombuffer(outcome("reversed", mode, schedule), f32) == np.arange(64, 0, -1)).all()
        y = np.zeros(1, np.uint32)
        program("faults.metal", mode).run("total", (4, 1, 1), (64, 1, 1), [y], schedule)
        assert y[0] == 255 * 128


def test_what_a_launch_may_ask_for():
    run = program("faults.metal").run
    y = np.zeros(64, f32)
    with pytest.raises(EmulatorError, match="36000 bytes of threadgroup memory, the limit is 32768"):
        outcome("too_much_threadgroup_memory", "plain")
    with pytest.raises(EmulatorError, match="takes 1 buffers, 2 were given"):
        run("reversed", (1, 1, 1), (64, 1, 1), [y, y])
    for threads in ((48, 1, 1), (1024, 2, 1), (0, 1, 1)):
        with pytest.raises(EmulatorError, match="multiple of 32"):
            run("reversed", (1, 1, 1), threads, [y])
    with pytest.raises(EmulatorError, match="no kernel reverse;"):
        run("reverse", (1, 1, 1), (64, 1, 1), [y])
    with pytest.raises(EmulatorError, match="not contiguous"):
        run("reversed", (1, 1, 1), (64, 1, 1), [np.zeros(128, f32)[::2]])
    y.flags.writeable = False
    with pytest.raises(EmulatorError, match="read-only"):
        run("reversed", (1, 1, 1), (64, 1, 1), [y])


def test_a_wild_address_ends_the_launch_and_not_the_process():
    text = "kernel void wild(device int* y [[buffer(0)]], constant long& at [[buffer(1)]]) { y[at] = 1; }"
    with pytest.raises(EmulatorError, match="invalid memory access"):
        metal_emulator.compile(text).run("wild", (1, 1, 1), (32, 1, 1), [np.zeros(1, np.int32), np.array(1 << 44)])
    assert len(outcome("reversed", "plain")) == 256
