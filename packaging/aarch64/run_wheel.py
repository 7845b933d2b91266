"""Installs an aarch64 wheel beside Debian's aarch64 Python and runs specfast there, under qemu: `run_wheel.py WHEEL ARGUMENT...`

Nothing is installed on this machine: packages are downloaded with apt's own state directory and unpacked into build/aarch64.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

WORK = Path(__file__).resolve().parents[2] / "build" / "aarch64"
MINOR = sys.version_info.minor


def root() -> Path:
    """The directory with Debian's aarch64 Python, downloaded the first time."""
    target = WORK / "root"
    if (target / "complete").exists():
        return target
    state, packages = WORK / "apt", WORK / "debs"
    for directory in (state / "lists/partial", state / "cache/archives/partial", packages, target):
        directory.mkdir(parents=True, exist_ok=True)
    options = [
        "APT::Architecture=arm64",
        "APT::Architectures::=arm64",
        f"Dir::State::lists={state}/lists",
        f"Dir::Cache={state}/cache",
    ]
    options += ["Dir::State::status=/dev/null", "APT::Sandbox::User=root"]
    apt = ["apt-get", "-qq", *(f"-o{option}" for option in options)]
    subprocess.run([*apt, "update"], check=True)
    wanted = [f"python3.{MINOR}-minimal", f"libpython3.{MINOR}-stdlib", "libstdc++6"]
    plan = subprocess.run(
        [*apt, "install", "-s", "--no-install-recommends", *wanted], capture_output=True, text=True, check=True
    )
    names = [line.split()[1] for line in plan.stdout.splitlines() if line.startswith("Inst ")]
    subprocess.run([*apt, "download", *names], cwd=packages, check=True)
    for package in packages.glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", package, target], check=True)
    (target / "complete").touch()
    return target


def install(wheel: Path) -> Path:
    """The directory with the wheel and what it depends on, for aarch64."""
    site = WORK / "site"
    shutil.rmtree(site, ignore_errors=True)
    platforms = [f"--platform={name}_aarch64" for name in ("manylinux_2_28", "manylinux_2_17", "manylinux2014")]
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--target",
        str(site),
        "--only-binary=:all:",
        *platforms,
    ]
    subprocess.run([*command, f"--python-version=3.{MINOR}", str(wheel)], check=True)
    return site


if __name__ == "__main__":
    qemu = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    if qemu is None:
        sys.exit("needs qemu-user-static (apt)")
    debian, site = root(), install(Path(sys.argv[1]))
    python = [qemu, "-cpu", "max", "-L", str(debian), str(debian / f"usr/bin/python3.{MINOR}")]
    environment = {**os.environ, "PYTHONPATH": str(site), "PYTHONHOME": str(debian / "usr")}
    sys.exit(subprocess.run([*python, *sys.argv[2:]], env=environment, check=False).returncode)
