"""The table of what specfast relies on in exo: our stand-in agrees, additions are withheld where it does not hold, and the real exo agrees."""

import functools
import importlib
import inspect
import json
import os
import subprocess

import pytest
from exo_session import fake_exo
from specfast.exo import contract, hooks
from specfast.exo.engine import SpeculativeEngine

PYTHON = os.environ.get("SPECFAST_EXO_PYTHON")
STAND_IN = {
    "exo.inference.inference_engine": ("InferenceEngine.save_session", "InferenceEngine.clear_session"),
    "exo.orchestration.node": (
        "Node.__init__",
        "Node.process_prompt",
        "Node.process_tensor",
        "Node.forward_tensor",
        "Node.get_current_shard",
        "Node.get_topology_inference_engines",
        "Node.broadcast_opaque_status",
    ),
    "exo.api.chatgpt_api": ("ChatGPTAPI.handle_tokens", "ChatGPTAPI.handle_healthcheck"),
    "exo.main": ("main", "run"),
    "exo.inference.shard": ("Shard.is_first_layer", "Shard.is_last_layer"),
    "exo.download.new_shard_download": ("new_shard_downloader",),
}
"""Functions the stand-in has besides those of the contract's table; the real ones have the same parameters."""
REAL = """
import importlib, importlib.util, inspect, json, sys
spec = importlib.util.spec_from_file_location("contract", sys.argv.pop(1))
contract = importlib.util.module_from_spec(spec)
spec.loader.exec_module(contract)
stand_in = json.loads(sys.argv.pop(1))
answer = {}
for name in contract.SIGNATURES:
    module = importlib.import_module(name)
    functions = {path: contract._find(module, path) for path in (*contract.SIGNATURES[name], *stand_in.get(name, ()))}
    answer[name] = {
        "differences": contract.differences(module),
        "parameters": {path: f and list(inspect.signature(f).parameters) for path, f in functions.items()},
    }
print("\\n" + json.dumps(answer))
"""


@pytest.fixture
def plain(monkeypatch, tmp_path):
    """The stand-in without specfast's additions."""
    monkeypatch.setenv("EXO_HOME", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["exo", "--inference-engine", "dummy"])
    with fake_exo(hook=False):
        yield


def functions(name):
    return (*contract.SIGNATURES[name], *STAND_IN.get(name, ()))


def find(module, path):
    return functools.reduce(getattr, path.split("."), module)


def put(module, path, value):
    *owners, last = path.split(".")
    setattr(functools.reduce(getattr, owners, module), last, value)


def state(module):
    """Everything additions may change."""
    classes = [
        value for value in vars(module).values() if inspect.isclass(value) and value.__module__ == module.__name__
    ]
    named = dict(getattr(module, "inference_engine_classes", {}))
    return dict(vars(module)), [dict(vars(each)) for each in classes], named, SpeculativeEngine.emits_many


def with_another_parameter(function):
    """The same with its last parameter renamed, or with one more if it has none."""

    def other(*arguments, **options):
        return function(*arguments, **options)

    other.__code__ = other.__code__.replace(co_names=function.__code__.co_names)
    parameters = list(inspect.signature(function).parameters.values())
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    other.__signature__ = inspect.Signature(
        [*(p.replace(default=inspect.Parameter.empty) for p in parameters[:-1]), inspect.Parameter("renamed", kind)]
    )
    return other


def without_name(function, name):
    """The same, not knowing a name any more."""

    def other(*arguments, **options):
        return function(*arguments, **options)

    code = function.__code__
    other.__code__ = other.__code__.replace(co_names=tuple(n for n in code.co_names if n != name))
    other.__signature__ = inspect.signature(function)
    return other


def attributes(name):
    return [(name, path, each) for path, names in contract.ATTRIBUTES.get(name, {}).items() for each in names]


@pytest.mark.parametrize("name", contract.SIGNATURES)
def test_the_stand_in_agrees_with_the_table(plain, name):
    assert contract.differences(importlib.import_module(name)) == []


@pytest.mark.parametrize(
    ("name", "path"), [(name, path) for name in contract.SIGNATURES for path in contract.SIGNATURES[name]]
)
def test_another_parameter_and_a_missing_function_are_found(plain, name, path):
    module = importlib.import_module(name)
    put(module, path, with_another_parameter(find(module, path)))
    (difference,) = contract.differences(module)
    assert difference.startswith(f"{name}.{path} takes (")
    assert "renamed), not (" in difference
    put(module, path, None)
    assert f"{name}.{path} is missing" in contract.differences(module)


@pytest.mark.parametrize(
    ("name", "path", "attribute"), [case for name in contract.ATTRIBUTES for case in attributes(name)]
)
def test_a_dropped_attribute_is_found(plain, name, path, attribute):
    module = importlib.import_module(name)
    if path:
        put(module, path, without_name(find(module, path), attribute))
    else:
        delattr(module, attribute)
    assert f"{name}{path and '.' + path} has no {attribute}" in contract.differences(module)


@pytest.mark.parametrize("name", hooks._ADDITIONS)
def test_additions_are_made_where_the_module_agrees(plain, name, capfd):
    module = importlib.import_module(name)
    before = state(module)
    hooks.after(module)
    assert state(module) != before
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name", hooks._ADDITIONS)
@pytest.mark.parametrize("change", ["parameter", "attribute"])
def test_additions_are_withheld_where_it_differs_and_one_line_says_so(plain, name, change, capfd):
    module = importlib.import_module(name)
    if change == "parameter":
        path = next(iter(contract.SIGNATURES[name]))
        put(module, path, with_another_parameter(find(module, path)))
    elif attributes(name):
        _, path, attribute = attributes(name)[-1]
        put(module, path, without_name(find(module, path), attribute)) if path else delattr(module, attribute)
    else:
        delattr(module, "resolve_tokenizer")
    before = state(module)
    hooks.after(module)
    assert state(module) == before
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("specfast: this exo differs from the one known (")
    assert line.endswith(hooks._WITHOUT[name])


@pytest.mark.parametrize("needed", hooks._ALSO_NEEDED["exo.inference.inference_engine"])
def test_the_engine_also_needs_the_registry_and_shards(plain, needed, capfd):
    module, other = importlib.import_module("exo.inference.inference_engine"), importlib.import_module(needed)
    path = next(iter(contract.SIGNATURES[needed]))
    put(other, path, with_another_parameter(find(other, path)))
    hooks.after(module)
    assert "speculative" not in module.inference_engine_classes
    assert needed in capfd.readouterr().err


@pytest.mark.parametrize("needed", ["exo.inference.tokenizers", "exo.download.new_shard_download"])
def test_every_module_of_the_table_guards_an_addition(needed):
    assert any(needed in (name, *hooks._ALSO_NEEDED.get(name, ())) for name in hooks._ADDITIONS)


@pytest.mark.skipif(
    PYTHON is None, reason="SPECFAST_EXO_PYTHON does not name the interpreter of an environment with exo (docs/exo.md)"
)
def test_the_real_exo_agrees_with_the_table_and_the_stand_in(plain, tmp_path):
    hidden = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment = {**hidden, "SPECFAST_EXO_HOOK": "0", "EXO_HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    run = subprocess.run(
        [PYTHON, "-c", REAL, contract.__file__, json.dumps(STAND_IN), "--inference-engine", "dummy", "--disable-tui"],
        check=False,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert {name: each["differences"] for name, each in found.items()} == {key: [] for key in contract.SIGNATURES}
    for name in contract.SIGNATURES:
        module = importlib.import_module(name)
        ours = {path: list(inspect.signature(find(module, path)).parameters) for path in functions(name)}
        assert found[name]["parameters"] == ours
