"""Measures the figures of README and docs: `python -m benchmarks.NAME` prints a table.

Benchmarks use the modules of the scripts in `examples/`, so these are made importable here.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
