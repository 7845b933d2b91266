"""Paths and counts the tests share; what controllers measure stays in memory."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
os.environ["SPECFAST_MEASUREMENTS"] = "0"
