"""The house rules that a machine can check: arrows between layers, first lines, names, and the README's commands."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [p for folder in ("csrc", "src", "tests/cpp") for p in sorted((ROOT / folder).rglob("*.[ch]pp"))]
MODULES = sorted((ROOT / "python").rglob("*.py"))
STEMS = {"matmul_rows", "qkv_rope_append", "attend_rows", "swiglu_rows", "logits_rows", "embed_rows"}


def includes(path):
    return re.findall(r'^#include [<"]([^>"]+)', path.read_text(), re.M)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows_of_native_code(path):
    forbidden = r"nanobind|Python\.h|mlx" if path.is_relative_to(ROOT / "csrc") else r"mlx"
    if path.name.startswith("mlx_"):  # specfast._mlx: MLX, and of ours what needs no linking
        forbidden = r"^bind|decoder|regions\.hpp$|thread_pool"
    assert not [name for name in includes(path) if re.search(forbidden, name)]
    if path.is_relative_to(ROOT / "csrc"):
        assert not [name for name in includes(path) if "../src" in name or name.startswith("bind")]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows_of_python(path):
    text = path.read_text()
    allowed = path.parent.name if path.parent.name in ("mlx", "tinygrad") else "-"  # a host's own package imports it
    found = re.findall(r"^(?:from|import) (torch|mlx|mlx_lm|tinygrad|exo|tests|benchmarks)\b", text, re.M)
    assert not [name for name in found if not name.startswith(allowed)]
    if allowed == "-":
        assert not re.search(r"^from \.+mlx\b|^import specfast\.mlx\b", text, re.M)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_first_line_of_native_files(path):
    assert path.read_text().startswith("// ")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_first_line_of_modules(path):
    assert path.read_text().startswith('"""')
    assert path.stem not in ("utils", "helpers", "misc", "common")


def test_kernel_names_follow_the_grammar():
    from specfast import build_info

    info = build_info()
    names = [kernel["name"] for kernel in info["kernels"]]
    assert len(names) == len(set(names))
    for kernel in info["kernels"]:
        assert re.fullmatch(rf"{kernel['stem']}_\w+_\w+_\d+x\d+_{kernel['isa']}", kernel["name"]), kernel["name"]
    assert {kernel["stem"] for kernel in info["kernels"]} == STEMS
    for stem in STEMS:
        assert (ROOT / "csrc" / f"{stem}.cpp").is_file()


def test_isa_can_be_forced():
    command = [sys.executable, "-c", "import specfast; print(specfast.build_info()['isa'])"]
    out = subprocess.run(command, env={"SPECFAST_ISA": "scalar"}, capture_output=True, text=True, check=True).stdout
    assert out.strip() == "scalar"


def test_readme():
    readme = (ROOT / "README.md").read_text()
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"\bmake ([a-z0-9-]+)", readme):
        assert re.search(rf"^{target}:", makefile, re.M), target
    assert "TODO" not in readme
    for block in re.findall(r"```python\n(.*?)```", readme, re.S):
        if "mlx" not in block or importlib.util.find_spec("mlx_lm"):
            exec(compile(block, "README.md", "exec"), {})


@pytest.mark.skipif(not importlib.util.find_spec("mlx_lm"), reason="mlx-lm is not installed")
def test_mlx_document():
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "mlx.md").read_text(), re.S):
        exec(compile(block, "docs/mlx.md", "exec"), names)


def test_the_stub_is_in_step(tmp_path):
    """`make stubs` writes it; signatures are compared by their names and parameters."""
    fresh = tmp_path / "_core.pyi"
    command = [sys.executable, "-m", "nanobind.stubgen", "-q", "-m", "specfast._core", "-o", str(fresh)]
    subprocess.run(command, check=True, capture_output=True)

    def names(path):
        return re.findall(r"^\s*(?:def|class) (\w+)|(\w+): ", path.read_text(), re.M)

    assert names(fresh) == names(ROOT / "python" / "specfast" / "_core.pyi")
