"""The Metal sources as texts: self-contained, linted, compiled by a second compiler, every instantiation of the table."""

import importlib.util
import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from metal_launch import program
from specfast import metal
from specfast.errors import ConfigurationError

FULL = os.environ.get("SPECFAST_FULL") == "1"
FOLDER = Path(__file__).parents[1] / "metal"
STEMS = sorted(path.stem for path in FOLDER.glob("*.metal"))
TYPES = ("f16", "bf16", "f32")
WEIGHTS = [metal.Weights(), *(metal.Weights(bits, group) for bits in (4, 8) for group in (32, 64, 128))]
MANY = range(1, metal.MAX_ROWS + 1) if FULL else (1, 9)


def launches(stem):  # noqa: PLR0912
    """Of all types, weights and head sizes; of all M only at full counts."""
    pairs = list(itertools.product(WEIGHTS, TYPES))
    if not FULL:
        pairs = [pairs[0], pairs[4], pairs[9], pairs[14], pairs[20]]
    heads = [(dim, T) for dim in metal.HEAD_DIMS for T in TYPES if T != "f32" or dim <= 128]
    K = {"K": 128}
    match stem:
        case "embed_rows":
            return [metal.embed_rows(w, T, M=1, V=8, **K) for w, T in pairs]
        case "norm_rows":
            return [metal.norm_rows(T, M=1, eps=1e-5, **K) for T in TYPES]
        case "matmul_rows":
            kinds = ("store", "bias", "residual", "silu_mul")
            return [
                metal.matmul_rows(w, T, M=M, N=8, epilogue=e, **K)
                for (w, T), M, e in itertools.product(pairs, MANY, kinds)
            ]
        case "swiglu_rows":
            return [metal.swiglu_rows(w, T, M=M, N=8, **K) for (w, T), M in itertools.product(pairs, MANY)]
        case "logits_rows":
            rows = [metal.logits_rows(w, T, M=M, V=8, limit=8, **K) for (w, T), M in itertools.product(pairs, MANY)]
            return [*rows, metal.logits_best(M=1, V=8)]
        case "qkv_rope_append":
            shape = {"heads": 2, "kv_heads": 1, "capacity": 8, "eps": 1e-5, **K}
            made = []
            for (w, T), dim, between in itertools.product(pairs, metal.HEAD_DIMS, ("nothing", "bias", "qk_norm")):
                made += [metal.qkv_rope_append(w, T, M=M, head_dim=dim, between=between, **shape) for M in MANY[-1:]]
            return made if FULL else made[::4]
        case "attend_rows":
            shape = {"heads": 8, "kv_heads": 1, "capacity": 8, "positions": 8}
            rows = [
                metal.attend_rows(T, M=M, head_dim=dim, **shape)
                for (dim, T), M in itertools.product(heads, (1, 2, 4, 9))
            ]
            return rows + [metal.attend_spans(T, M=1, heads=8, head_dim=dim) for dim, T in heads]
        case "kv_cache":
            paths = [
                metal.compact_path("bf16", count=2, kv_heads=1, head_dim=64, capacity=8, to_cache=to)
                for to in (False, True)
            ]
            return [metal.commit_round(), *paths]
        case "law_rows":
            return [
                metal.law_weights(M=1, V=1, limit=1, temperature=1.0),
                metal.law_scales(M=1, V=1, limit=1),
                metal.law_rows(M=1, V=1),
            ]
        case "verify_tokens":
            return [metal.verify_scan(), metal.verify_masses(gamma=1, V=1), metal.verify_pick(), metal.verify_greedy()]
        case "couple_tokens":
            return [metal.couple_rows(M=1, V=1), metal.couple_pick()]
    raise AssertionError(f"no launches of {stem} are listed")


def kernels(stem):
    return [launch.kernel for launch in launches(stem)]


@pytest.mark.parametrize("stem", STEMS)
def test_text(stem):
    text = metal.source(stem)
    assert text.isascii()
    assert re.findall(r'#include "', text) == []
    assert "double" not in re.sub(r"//.*", "", text)
    assert (FOLDER / f"{stem}.metal").read_text().startswith("// ")
    for path in FOLDER.glob("*.h"):
        assert path.read_text().startswith("// ")


@pytest.mark.parametrize("stem", STEMS)
def test_lint(stem):
    from metal_emulator import EmulatorUnavailableError, lint

    try:
        assert lint.lint(metal.program(kernels(stem))) == []
    except EmulatorUnavailableError as missing:
        pytest.skip(str(missing))


@pytest.mark.parametrize("stem", STEMS)
def test_every_instantiation_compiles(stem):
    wanted = kernels(stem)
    if not FULL and len(wanted) > 12:
        wanted = wanted[:: len(wanted) // 6]
    assert {kernel.name for kernel in wanted} <= set(program(wanted).kernels)


@pytest.mark.parametrize("stem", STEMS)
def test_a_second_compiler_takes_it(stem):
    from metal_emulator import EmulatorUnavailableError, cuda

    wanted = kernels(stem)
    try:
        compiled, cubin = cuda.compile_cubin(metal.program(wanted if FULL else wanted[:4] + wanted[-2:]))
    except EmulatorUnavailableError as missing:
        pytest.skip(str(missing))
    assert cubin
    assert wanted[0].name in compiled.kernels


@pytest.mark.parametrize("stem", STEMS)
def test_buffers_are_inputs_then_outputs_then_constants(stem):
    """So that every consumer can bind them in one way."""
    for launch in launches(stem):
        made = metal.generated(launch.kernel)
        constants = ("dims",) if launch.dims else ()
        assert made.buffers == (*(name for name in made.inputs if name != "dims"), *made.outputs, *constants)
        assert len(launch.dims) < 8
        assert launch.threadgroup[0] % 32 == 0


def test_host_names_are_distinct():
    names = [launch.kernel for stem in STEMS for launch in launches(stem)]
    assert len({kernel.name for kernel in names}) == len(set(names))


def test_the_predictions_in_the_document_are_the_model_s():
    path = FOLDER.parent / "benchmarks" / "metal_cost.py"
    spec = importlib.util.spec_from_file_location("metal_cost", path)
    model = importlib.util.module_from_spec(spec)
    sys.modules["metal_cost"] = model  # dataclasses look there
    spec.loader.exec_module(model)
    document = (FOLDER.parent / "docs" / "metal.md").read_text()
    assert model.table() in document
    assert model.occupancy() in document
    assert model.kernels() in document
    slow, fast = (model.ratios(model.GPUS[0], w)[-1] for w in (model.Q4, model.BF16))
    assert slow > 1.2 > fast >= 1  # unpacking 4 bits is what costs


def test_an_unknown_file():
    with pytest.raises(ConfigurationError, match="no Metal source nothing"):
        metal.source("nothing")


@pytest.mark.skipif(shutil.which("xcrun") is None, reason="not run: Apple's compiler is on Macs only")
@pytest.mark.parametrize("stem", STEMS)
def test_apples_compiler_takes_it(stem, tmp_path):
    file = tmp_path / f"{stem}.metal"
    file.write_text(metal.program(kernels(stem)))
    command = ["xcrun", "-sdk", "macosx", "metal", "-std=metal3.1", "-c", file, "-o", tmp_path / "kernels.air"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
