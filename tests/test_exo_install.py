"""Installing: what exo's environment sees of specfast, what start-up costs, and what uninstalling leaves."""

import argparse
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from specfast.cli import doctor
from specfast.exo import detection

ROOT = Path(__file__).parents[1]
SITE = Path(sysconfig.get_paths()["purelib"])
HOOK_FILES = ("specfast_exo.pth", "_specfast_exo_hook.py")
MOST_MICROSECONDS = 3000
NOT_HERE = ("opencv", "scapy", "nvidia", "grpcio-tools", "tinygrad", "uuid")  # large or beside the point
EXO_PINS = [line for line in (ROOT / "tests" / "exo_requirements.txt").read_text().splitlines() if not line.startswith(("#", *NOT_HERE))]  # fmt: skip


def run(*command, code=0, **variables):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "SPECFAST"))}
    done = subprocess.run(
        command, env=environment | variables, capture_output=True, text=True, check=False, cwd=ROOT / "tests"
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def wheel():
    """The wheel that this environment was installed from."""
    found = sorted((ROOT / "build" / "wheel").glob("specfast-*.whl"))
    if not found:
        pytest.skip("build/wheel has no wheel; `make test` builds it")
    return str(found[0])


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A fresh virtual environment's interpreter."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", str(folder))
    return folder / "bin" / "python"


def site_of(python):
    return Path(run(str(python), "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])").strip())


def files_of(python):
    site = site_of(python)
    return {file.relative_to(site) for file in site.rglob("*") if file.is_file()}


def test_exos_environment_keeps_its_packages_and_uninstalling_leaves_nothing(environment):
    pip = (str(environment), "-m", "pip", "--disable-pip-version-check")
    run(*pip, "install", "--quiet", *EXO_PINS)
    for package in ("tokenizers", "huggingface_hub", "safetensors"):
        assert (site_of(environment) / package).is_dir()
    packages = json.loads(run(*pip, "list", "--format", "json"))
    check, files = run(*pip, "check"), files_of(environment)
    run(*pip, "install", "--quiet", wheel())
    after = json.loads(run(*pip, "list", "--format", "json"))
    assert [package for package in after if package["name"] != "specfast"] == packages
    assert len(after) == len(packages) + 1
    assert run(*pip, "check") == check
    assert set(HOOK_FILES) <= {str(file) for file in files_of(environment)}
    assert "ExoFinder" in run(str(environment), "-c", "import sys; print(sys.meta_path[0])")

    run(*pip, "uninstall", "--quiet", "--yes", "specfast")
    left = {file for file in files_of(environment) - files if "pycache" not in str(file)}
    assert left == set()
    assert not [file for file in files_of(environment) if "specfast" in str(file)]
    assert "specfast" not in run(str(environment), "-c", "import sys; print(sys.meta_path)")


def test_the_hook_is_installed_here():
    assert all((SITE / name).is_file() for name in HOOK_FILES)


def test_the_hook_costs_little_and_imports_nothing():
    costs = []
    for _ in range(15):
        log = run(sys.executable, "-X", "importtime", "-c", "pass")
        costs.append(int(re.search(r"\|\s*(\d+) \| +_specfast_exo_hook", log)[1]))
    assert min(costs) < MOST_MICROSECONDS
    loaded = run(sys.executable, "-c", "import sys; print(sorted(set(sys.modules)))")
    assert "_specfast_exo_hook" in loaded
    assert "'specfast" not in loaded
    assert "numpy" not in loaded


def test_the_hook_uses_the_standard_library_only():
    source = (SITE / "_specfast_exo_hook.py").read_text()
    assert set(re.findall(r"^import (\w+)", source, re.M)) == {"os", "sys"}


def test_the_kill_switch():
    assert "ExoFinder" not in run(sys.executable, "-c", "import sys; print(sys.meta_path)", SPECFAST_EXO_HOOK="0")


def write_package(folder, files):
    for name, text in files.items():
        path = folder / "exo" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_another_program_called_exo_is_left_alone(tmp_path):
    write_package(tmp_path, {"__init__.py": "", "main.py": "import sys; found = 'specfast' in sys.modules"})
    told = "from specfast.exo.detection import find_exo; print(find_exo().explain())"
    assert "False" in run(sys.executable, "-c", "import exo.main; print(exo.main.found)", PYTHONPATH=str(tmp_path))
    assert "another program" in run(sys.executable, "-c", told, PYTHONPATH=str(tmp_path))
    out = run(sys.executable, "-m", "specfast.exo", PYTHONPATH=str(tmp_path), code=2)
    assert "another program" in out


def test_the_second_generation_is_named_and_left_alone(tmp_path):
    files = {"__init__.py": "", "main.py": "import sys; found = 'specfast' in sys.modules"}
    write_package(tmp_path, {**files, "worker/engines/base.py": ""})
    told = "from specfast.exo.detection import find_exo; print(find_exo().explain())"
    assert "False" in run(sys.executable, "-c", "import exo.main; print(exo.main.found)", PYTHONPATH=str(tmp_path))
    assert "second generation" in run(sys.executable, "-c", told, PYTHONPATH=str(tmp_path))


def test_what_is_not_supported_is_named(tmp_path, monkeypatch, capsys):
    app = tmp_path / "EXO.app"
    app.mkdir()
    monkeypatch.setattr(detection, "APPS", (app, tmp_path / "other.app"))
    doctor.run(argparse.Namespace(json=False))
    assert f"{app}: not supported" in capsys.readouterr().out
    hooked = detection.FoundExo("second generation", tmp_path, "0.3", True)
    assert "SPECFAST_EXO=1" in hooked.explain()
    assert "several nodes are not supported" in hooked.explain()
    assert "start-up hook" in dataclasses.replace(hooked, hooked=False).explain()
    assert hooked.usable
    assert not dataclasses.replace(hooked, hooked=False).usable


def test_no_exo():
    assert "not installed" in run(sys.executable, "-c", "from specfast.exo.detection import find_exo; print(find_exo().explain())")  # fmt: skip
    assert "not installed" in run(sys.executable, "-m", "specfast.exo", code=2)


def test_a_broken_specfast_does_not_keep_exo_from_starting(tmp_path):
    files = dict.fromkeys(("__init__.py", "inference/__init__.py", "orchestration/node.py"), "")
    write_package(tmp_path, {**files, "inference/inference_engine.py": "x = 1", "main.py": ""})
    shutil.copy(SITE / "_specfast_exo_hook.py", tmp_path)
    code = (
        "import sys; sys.modules['specfast'] = None; import _specfast_exo_hook as hook; hook.install()\n"
        "import exo.inference.inference_engine as engine; print('x is', engine.x)"
    )
    out = run(sys.executable, "-c", code, PYTHONPATH=str(tmp_path))
    assert "x is 1" in out
    assert "speculative decoding is not available in exo" in out


@pytest.mark.skipif(os.environ.get("SPECFAST_FULL") != "1", reason="compiles once more; `make test-full` does it")
def test_an_editable_install_has_the_hook_too(tmp_path):
    run(sys.executable, "-m", "venv", str(tmp_path / "environment"))
    python = str(tmp_path / "environment" / "bin" / "python")
    copy = tmp_path / "source"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".venv*", "build", ".git", "dist", ".*_cache"))
    pip = (python, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "install", "--quiet", "--editable", str(copy))
    assert "ExoFinder" in run(python, "-c", "import sys; print(sys.meta_path)")
    run(*pip, "uninstall", "--quiet", "--yes", "specfast")
    assert not [file for file in files_of(python) if "specfast" in str(file)]
