"""How OpenMP's threads wait for one another. It is decided where the process starts, before torch is imported.

By itself OpenMP lets them spin, which is fastest on a machine of one's own and takes most of the speed beside others
(benchmarks/waiting.py measures it, docs/scaling-out.md).
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from statistics import median

VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
LOAD = Path("/proc/loadavg")
SAMPLES, PAUSE = 5, 0.004


def choose() -> None:
    """Let threads sleep while they wait if others use the processors; a choice of the user's own stands."""
    if not any(os.environ.get(name) for name in VARIABLES) and crowded():
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def crowded() -> bool:
    """Whether our threads and what runs already are more than the processors; False where the system does not say."""
    processors = os.cpu_count() or 1
    given = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    threads = int(given) if given.isdecimal() and int(given) else processors
    return threads > 1 and running() + threads > processors


def running() -> float:
    """How many other threads of the machine run or want to, now."""
    found = []
    for _ in range(SAMPLES):
        try:
            found.append(int(LOAD.read_text("ascii").split()[3].partition("/")[0]) - 1)
        except (OSError, ValueError, IndexError):
            return 0.0
        time.sleep(PAUSE)
    return median(found)
