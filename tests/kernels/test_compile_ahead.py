"""Compiling ahead: launches are noted, not made; jobs run side by side, and neither errors nor time stop the caller."""

from __future__ import annotations

import functools
import os
import pickle
import time
from pathlib import Path

import pytest
import torch

from lightning_int8.kernels import compile_ahead
from lightning_int8.kernels.launch import CachedLaunch


class Parameter:
    do_not_specialize = False


class Unspecialized:
    do_not_specialize = True


class Kernel:
    """Looks like `triton.jit`'s, and must not be launched."""

    params = (Parameter, Parameter, Unspecialized)

    @staticmethod
    def fn() -> None:
        """Its name and module are the kernel's."""

    def __getitem__(self, grid: tuple[int, ...]) -> None:
        raise AssertionError("launched")


def test_each_kind_of_launch_is_noted_once() -> None:
    kernel = CachedLaunch(Kernel())
    x = torch.zeros(64, dtype=torch.int8)

    def work() -> None:
        for rows, capacity in ((16, 3), (32, 4), (5, 3)):
            kernel[(1,)](x, rows, capacity, BLOCK=128)
        kernel[(1,)](x[1:], 16, 3, BLOCK=128)
        kernel[(1,)](x, 16, 3, BLOCK=64)

    found = compile_ahead.noted(work)
    # 16 and 32 are divisible by 16, the last argument is not specialized on; offsets and constants count.
    assert [(k.args[1], k.args[0].offset, dict(k.constants)["BLOCK"]) for k in found] == [
        (16, 0, 128), (5, 0, 128), (16, 1, 128), (16, 0, 64),
    ]  # fmt: skip
    assert (found[0].module, found[0].name) == (__name__, "fn")
    assert pickle.loads(pickle.dumps(found)) == found
    with pytest.raises(AssertionError, match="launched"):
        kernel[(1,)](x, 16, 3, BLOCK=128)


def fail() -> None:
    raise ValueError("no such tile\nand more")


def test_jobs_run_in_other_processes_and_errors_are_told(tmp_path: Path, capfd) -> None:
    jobs = [functools.partial(Path.touch, tmp_path / str(n)) for n in range(3)]
    ended = dict(compile_ahead.side_by_side([*jobs, fail, functools.partial(print, "noise")], 2, 60.0))
    assert ended == {0: "", 1: "", 2: "", 3: "ValueError: no such tile", 4: ""}
    assert len(list(tmp_path.iterdir())) == 3
    assert "noise" not in capfd.readouterr().out
    assert "TORCHINDUCTOR_COMPILE_THREADS" not in os.environ


def test_what_still_runs_when_the_time_is_over_is_stopped() -> None:
    begin = time.monotonic()
    assert list(compile_ahead.side_by_side([functools.partial(time.sleep, 60)], 1, 0.5)) == []
    assert time.monotonic() - begin < 20
    assert list(compile_ahead.side_by_side([], 4, 60.0)) == []
