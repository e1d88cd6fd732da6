"""Running a test file in Triton's interpreter, in a process of its own.

Triton decides when it is imported whether kernels are interpreted, and a process that interprets would make `triton`
the automatic backend on CPUs. So a file calls :func:`run_interpreted` on itself, and :func:`interpreting` tells the
process that does so to collect its other tests.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_VARIABLE = "LIGHTNING_INT8_TEST_INTERPRETED"


def interpreting(file: str) -> bool:
    """Whether this process runs ``file`` interpreted."""
    return os.environ.get(_VARIABLE) == Path(file).stem


def run_interpreted(file: str) -> None:
    """Runs pytest on ``file`` interpreted, and fails as it does."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", file]
    environment = os.environ | {"TRITON_INTERPRET": "1", _VARIABLE: Path(file).stem}
    for name in ("PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER", "LIGHTNING_INT8_BACKEND"):
        environment.pop(name, None)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
