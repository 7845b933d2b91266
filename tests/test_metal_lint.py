"""The lint finds every planted mistake and nothing else, and passes what is right; NVRTC compiles the same files."""

import re
from pathlib import Path

import metal_emulator
import numpy as np
import pytest
from metal_emulator import EmulatorUnavailableError, cuda
from metal_emulator.lint import lint

HERE = Path(metal_emulator.__file__).parent


def findings(source: str | Path) -> list[str]:
    try:
        return lint(source)
    except EmulatorUnavailableError as missing:
        pytest.skip(str(missing))


def test_every_planted_mistake_is_found_and_nothing_else():
    found = findings(HERE / "rejected.metal")
    lines = (HERE / "rejected.metal").read_text().splitlines()
    planted = {i: line.partition("// REJECTED ")[2] for i, line in enumerate(lines, 1) if "// REJECTED " in line}
    unmatched = list(found)
    for number, message in planted.items():
        hit = next(
            (f for f in unmatched if message in f and re.search(rf"rejected\.metal(:{number}\b|: kernel)", f)), None
        )
        assert hit, f"line {number}: {message!r} is not among\n" + "\n".join(unmatched)
        unmatched.remove(hit)
    assert not unmatched


@pytest.mark.parametrize("file", ["semantics.metal", "faults.metal"])
def test_right_files_pass(file):
    assert findings(HERE / file) == []


def test_templates_without_an_instantiation_do_not_pass():
    text = "#include <metal_stdlib>\nusing namespace metal;\ntemplate <typename T> [[kernel]] void f(device T* x [[buffer(0)]]) { x = nonsense; }\n"
    assert "no kernel is instantiated" in findings(text)[0]


@pytest.mark.parametrize("file", ["semantics.metal", "faults.metal"])
def test_nvrtc_compiles_them(file):
    try:
        metal, cubin = cuda.compile_cubin(HERE / file)
    except EmulatorUnavailableError as missing:
        pytest.skip(str(missing))
    assert cubin[:4] == b"\x7fELF"
    assert all(name.encode() in cubin for name in metal.kernels)
    with pytest.raises(RuntimeError, match=r"undefined|no instance"):
        cuda.compile_cubin("kernel void f(device int* x [[buffer(0)]]) { x[0] = nonsense(); }\n")


def test_an_nvidia_gpu_agrees():
    """Not run where there is none: the collectives and matrices, bit for bit, with simdgroups as warps."""
    try:
        gpu = cuda.CudaProgram(HERE / "semantics.metal")
    except EmulatorUnavailableError as missing:
        pytest.skip(f"not run: {missing}")
    cpu = metal_emulator.compile(HERE / "semantics.metal")
    rng = np.random.default_rng(6)
    x, (a, b), c = (
        rng.normal(size=32).astype(np.float32),
        rng.normal(size=(2, 64)).astype(np.float16),
        np.zeros(64, np.float32),
    )
    for name, inputs, size in (("collectives", [x], 12 * 32), ("matrices", [a, b, c], 64)):
        results = [np.zeros(size, np.float32), np.zeros(size, np.float32)]
        for program, result in zip((cpu, gpu), results, strict=True):
            program.run(name, (1, 1, 1), (32, 1, 1), [*inputs, result])
        assert results[0].tobytes() == results[1].tobytes()
