"""Every figure that README and docs quote is printed by a module of this package: `python -m benchmarks.NAME`.

Benchmarks train and measure with the very parts of the scripts, so those are made importable here, once for all.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
