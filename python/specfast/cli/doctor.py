"""`specfast doctor`: what this installation has and uses, and why not more."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import platform
import sys
from typing import Any

from .. import build_info, embedded

_HOSTS = {
    "mlx": ("mlx", "models run by the native host from the same checkpoints in this version"),
    "mlx-lm": ("mlx_lm", "models run by the native host from the same checkpoints in this version"),
    "tinygrad": ("tinygrad", "models run by the native host from the same checkpoints in this version"),
    "exo": ("exo", "not hooked in this version"),
}


def add_parser(commands: Any) -> None:
    """Registers the subcommand."""
    parser = commands.add_parser("doctor", help="what was found, and why not", description="Says which kernels and hosts this installation has and uses.")
    parser.set_defaults(run=run)
    parser.add_argument("--json", action="store_true", help="print a JSON object")


def examine() -> dict[str, Any]:
    """Version, kernels, hosts and the embedded pair."""
    info = build_info()
    hosts: dict[str, Any] = {"native": {"found": True, "used": True, "why": "always available"}}
    for name, (module, why) in _HOSTS.items():
        found = importlib.util.find_spec(module) is not None
        version = None
        if found:
            try:
                version = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                version = "unknown"
        hosts[name] = {"found": found, "version": version, "used": False, "why": why if found else "not installed"}
    unsupported = sorted(set(info["isas_compiled"]) - set(info["isas_supported"]))
    return {
        "version": info["version"],
        "python": sys.version.split()[0],
        "machine": f"{platform.system()} {platform.machine()}",
        "compiler": info["compiler"],
        "isa": info["isa"],
        "isas_compiled": info["isas_compiled"],
        "isas_not_run_here": unsupported,
        "threads": info["threads"],
        "selected": info["selected"],
        "hosts": hosts,
        "embedded_pair": all((embedded.path(role) / "config.json").is_file() for role in ("target", "draft")),
    }  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Prints the examination."""
    report = examine()
    if options.json:
        print(json.dumps(report))
        return 0
    print(f"specfast {report['version']}, Python {report['python']}, {report['machine']}, {report['compiler']}")
    print(f"kernels: {report['isa']} selected of {', '.join(report['isas_compiled'])} compiled; {report['threads']} threads")
    for isa in report["isas_not_run_here"]:
        print(f"  {isa}: compiled, but this CPU cannot run it")
    for name in report["selected"]:
        print(f"  {name}")
    print("hosts:")
    for name, host in report["hosts"].items():
        version = f" {host['version']}" if host.get("version") else ""
        print(f"  {name}{version}: {'used' if host['used'] else 'not used'}, {host['why']}")
    print(f"embedded pair: {'present' if report['embedded_pair'] else 'missing'}")
    return 0
