"""A run killed at any point resumes from its last checkpoint with the losses it would have had."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.resumable_run import run

ROOT = Path(__file__).parents[1]


def losses(folder: Path) -> dict[int, str]:
    lines = (folder / "losses.txt").read_text().splitlines()
    return {int(step): loss for step, loss in (line.split() for line in lines)}


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.strict
@pytest.mark.parametrize(("recipe", "killed_after"), [("row", 19), ("block", 33)])
def test_killed_run_resumes_exactly(tmp_path, recipe: str, killed_after: int) -> None:
    steps = 48
    killed = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.resumable_run", str(killed), recipe, str(steps)], cwd=ROOT,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    written = killed / "losses.txt"
    while time.monotonic() < deadline and process.poll() is None:
        if written.exists() and len(written.read_text().splitlines()) >= killed_after:
            break
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors

    checkpoint = killed / "checkpoints" / "last.ckpt"
    at = torch.load(checkpoint, weights_only=True)["global_step"]
    assert at % 7 == 0
    assert at <= max(losses(killed))
    written.unlink()

    run(tmp_path / "whole", recipe, steps)
    run(killed, recipe, steps, checkpoint)
    expected, resumed = losses(tmp_path / "whole"), losses(killed)
    assert min(resumed) == at + 1
    assert resumed == {step: loss for step, loss in expected.items() if step > at}
