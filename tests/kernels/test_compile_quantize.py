"""Each quantize kernel compiles for every architecture, without spills and within its shared memory; needs no GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.kernels.compiling import SHARED_MEMORY


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_compiles(capability):
    # Triton decides when it is imported whether kernels are interpreted, so in a process of its own.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.compile_quantize", str(capability)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, "\n".join(
        [line for line in done.stdout.splitlines() if not line.endswith("True")] + [done.stderr[-2000:]]
    )
