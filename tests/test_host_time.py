"""Every op of a linear is repeated from its noted launches on Hopper, and the host's benchmark runs without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

# In a process of its own, since kernels are replaced there.
RUN = """
from benchmarks import host_time
from lightning_int8.kernels.replay import Replayed

made = []
first = Replayed.__init__
Replayed.__init__ = lambda self, function: (made.append(self), first(self, function))[1]
found = host_time.main(["--repeats", "1", "--tokens", "384", "--features", "256", "--recipe", "{recipe}"])
kinds = [program for replayed in made for program in replayed._programs.values()]
print("repeated", sum(map(callable, kinds)), "of", len(kinds), "fine" if found["{recipe}"] > 0 else "no time")
"""


@pytest.mark.parametrize(
    # X, W, Wᵀ, dY and two kinds of products, since forward and dgrad of a square weight are of one kind, and the sums
    # that the budget of `row` takes of X and dY.
    ("recipe", "kinds"),
    [("row", 8), ("block", 6)],
)
def test_every_op_of_a_linear_is_repeated(recipe, kinds):
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment.pop("LIGHTNING_INT8_BACKEND", None)
    done = subprocess.run(
        [sys.executable, "-c", RUN.format(recipe=recipe)], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"repeated {kinds} of {kinds} fine" in done.stdout
