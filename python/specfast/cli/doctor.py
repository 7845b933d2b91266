"""`specfast doctor`: what this installation has and uses, and why not more."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import warnings
from typing import Any

from .. import _core, build_info, embedded
from ..exo.detection import find_exo, packaged_apps


def add_parser(commands: Any) -> None:
    """Registers the subcommand."""
    parser = commands.add_parser(
        "doctor",
        help="kernels and hosts found, and why not",
        description="Says which kernels and hosts this installation has and uses, and why not others.",
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    parser.add_argument("--json", action="store_true", help="print a JSON object")


def examine() -> dict[str, Any]:
    """Version, kernels, hosts and the embedded pair."""
    info = build_info()
    problem = info["isa_problem"]
    roles = ("target", "draft")
    return {
        "version": info["version"],
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "compiler": info["compiler"],
        "isa": info["isa"],
        "isa_problem": problem,
        "isa_forced": os.environ.get("SPECFAST_ISA"),
        "isas_compiled": info["isas_compiled"],
        "isas_supported": info["isas_supported"],
        "threads": info["threads"],
        "threads_started": _core.start_threads(),
        "kernels": info["kernels"],
        "selected": info["selected"],
        "hosts": {
            "native": {
                "found": True,
                "used": not problem,
                "version": info["version"],
                "why": problem or "always there",
            }
        }
        | _look_for_mlx()
        | {"tinygrad": _look_for_tinygrad()}
        | {"exo": _look_for_exo()},
        "embedded_pair": all((embedded.path(role) / "model.safetensors").is_file() for role in roles),  # type: ignore[arg-type]
    }


def _look_for(module: str, distribution: str) -> dict[str, Any]:
    try:
        found = importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        found = False
    version = None
    if found:
        try:
            version = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            version = "unknown"
    return {"found": found, "used": False, "version": version, "why": "" if found else "not installed"}


def _look_for_mlx() -> dict[str, dict[str, Any]]:
    hosts = {"mlx": _look_for("mlx", "mlx"), "mlx_lm": _look_for("mlx_lm", "mlx-lm")}
    if any(host["found"] for host in hosts.values()):
        try:
            primitives = importlib.import_module("specfast.mlx.primitives")
        except ImportError as error:
            return {name: host | {"why": str(error)} if host["found"] else host for name, host in hosts.items()}
        why_not = primitives.why_not()
        path = f"as one native call ({why_not})" if why_not else "as primitives of MLX's graph"
        why = f"specfast.mlx.accelerate runs a forward pass on the CPU {path}; on an Apple GPU as Metal kernels (never measured)"
        return {name: host | {"used": True, "why": why} for name, host in hosts.items()}
    return hosts


def _look_for_tinygrad() -> dict[str, Any]:
    host = _look_for("tinygrad", "tinygrad")
    if not host["found"]:
        return host
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            problem = importlib.import_module("specfast.tinygrad").private.graph_problem()
    except ImportError as error:
        return host | {"why": str(error)}
    path = f"beside its graph, on copies of the weights ({problem})" if problem else "as one program of its graph"
    return host | {"used": True, "why": f"specfast.tinygrad.accelerate runs a forward pass on the CPU {path}"}


def _look_for_exo() -> dict[str, Any]:
    exo = find_exo()
    return {
        "found": exo.kind != "none",
        "used": exo.usable,
        "version": exo.version,
        "why": exo.explain(),
        "generation": exo.kind,
        "path": None if exo.path is None else str(exo.path),
        "hook": exo.hooked,
        "packaged": [str(path) for path in packaged_apps()],
    }


def run(options: argparse.Namespace) -> int:
    """Prints the examination; 1 where no kernels can be used."""
    report = examine()
    code = 1 if report["isa_problem"] else 0
    if options.json:
        print(json.dumps(report))
        return code
    print(f"specfast {report['version']}, Python {report['python']}, {report['machine']}, {report['compiler']}")
    forced = f" (SPECFAST_ISA={report['isa_forced']})" if report["isa_forced"] else ""
    refused = report["threads_started"] < report["threads"]
    only = f", of which the system starts {report['threads_started']} (ulimit -u, ulimit -v)" if refused else ""
    print(f"kernels: {report['isa'] or 'none'} selected{forced}, {report['threads']} threads{only}")
    if report["isa_problem"]:
        print(f"  problem: {report['isa_problem']}")
    for isa in report["isas_compiled"]:
        if isa != report["isa"]:
            runs = isa in report["isas_supported"]
            print(f"  {isa}: compiled, {'not selected' if runs else 'but this CPU lacks its instructions'}")
    for name in report["selected"]:
        print(f"  {name}")
    print("hosts:")
    for name, host in report["hosts"].items():
        version = f" {host['version']}" if host["version"] else ""
        print(f"  {name}{version}: {'used' if host['used'] else 'not used'}, {host['why']}")
    for path in report["hosts"]["exo"]["packaged"]:
        print(f"  {path}: not supported, it has a Python of its own; install exo with pip or uv beside specfast")
    print(
        f"embedded pair: {'there' if report['embedded_pair'] else 'missing; install a release wheel, or name a model'}"
    )
    return code
