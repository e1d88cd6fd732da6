"""Launching again takes what was compiled for the same kinds of arguments, and compiles for any other kind."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_int8.kernels.launch import CachedLaunch


class Kernel:
    """Stands for a JITFunction: compiles on each call of its own, and records every run."""

    __name__ = "kernel"
    arg_names = ("x", "bias", "rows", "scale", "BLOCK")
    constexprs = (4,)

    def __init__(self) -> None:
        self.compiled = 0
        self.runs: list[tuple[Any, ...]] = []

    def __getitem__(self, grid):
        def run(*args, **constants):
            if len(grid) < 3:
                self.compiled += 1
            self.runs.append((*grid, *args))
            return self

        return run


@pytest.fixture
def kernel() -> Kernel:
    return Kernel()


X = torch.zeros(64)


def test_the_same_kinds_run_what_was_compiled_with_the_new_values(kernel):
    launch = CachedLaunch(kernel)
    other = torch.ones(128)
    launch[(3,)](X, None, 5, 0.5, BLOCK=32, num_warps=4)
    launch[(7, 2)](other, None, 7, 2.5, BLOCK=32, num_warps=4)
    assert kernel.compiled == 1
    grid, (x, bias, *rest) = kernel.runs[1][:3], kernel.runs[1][3:]
    assert grid == (7, 2, 1)
    assert x is other
    assert bias is None
    assert rest == [7, 2.5, 32]


@pytest.mark.parametrize(
    "args",
    [
        (X.bfloat16(), None, 5, 0.5),
        (X[1:], None, 5, 0.5),  # not aligned
        (X, X, 5, 0.5),
        (X, None, 1, 0.5),
        (X, None, 16, 0.5),
        (X, None, 2**31 + 5, 0.5),
    ],
)
def test_another_kind_of_argument_is_compiled(kernel, args):
    launch = CachedLaunch(kernel)
    launch[(1,)](X, None, 5, 0.5, BLOCK=32)
    launch[(1,)](*args, BLOCK=32)
    assert kernel.compiled == 2


def test_other_constants_are_compiled(kernel):
    launch = CachedLaunch(kernel)
    for block, warps in ((32, 4), (64, 4), (64, 8)):
        launch[(1,)](X, None, 5, 0.5, BLOCK=block, num_warps=warps)
    assert kernel.compiled == 3


def test_a_constant_passed_by_position_is_refused(kernel):
    with pytest.raises(TypeError, match="by name"):
        CachedLaunch(kernel)[(1,)](X, None, 5, 0.5, 32)
