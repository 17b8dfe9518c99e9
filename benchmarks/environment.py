"""What a results file says of where its numbers come from."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from bayes_svdo.experiments import files

RESULTS = Path(__file__).parent / "results"

# Beside every table with a count of ARDRegression's coefficients.
ARD_CAVEAT = (
    "ARDRegression is scikit-learn's as it comes, with `threshold_lambda=1e4`: it sets a "
    "coefficient to 0 only where its precision exceeds that, so its number of nonzero coefficients "
    "says little."
)


def environment(*packages: str) -> dict[str, Any]:
    """Versions and machine, for the results file of a benchmark."""
    names = ("torch", "pyro-ppl", "numpy", "scikit-learn", *packages)
    return {
        "bayes_svdo": version("bayes-svdo"),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in names},
        "machine": {"cpu": _cpu(), "cores": os.cpu_count(), "system": platform.system()},
    }


def write_json(path: Path, content: object) -> None:
    """Write all of it or nothing, with null for inf and NaN, which JSON does not have."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(path, content)


def mean_and_sd(values: list[float], digits: int) -> str:
    """A cell of a table: the mean, and the standard deviation in brackets."""
    spread = f" ({stdev(values):.{digits}f})" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}"


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
