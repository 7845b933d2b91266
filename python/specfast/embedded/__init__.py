"""The small trained pair that ships with the package, so that the first command works offline."""

from __future__ import annotations

from pathlib import Path
from typing import Literal


def path(role: Literal["target", "draft"]) -> Path:
    """The directory of the embedded target or draft."""
    return Path(__file__).parent / role
