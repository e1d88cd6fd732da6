"""The file in which GPU tests leave what they saw."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SUITE = """
import pytest

@pytest.mark.gpu
def test_on_a_gpu(record_property):
    record_property("peak memory", "1.5 GiB")

@pytest.mark.gpu
@pytest.mark.skip
def test_of_more_gpus(): ...

@pytest.mark.gpu
def test_that_fails(): assert 0

def test_elsewhere(): ...
"""
# A machine with two GPUs, as far as the file is concerned.
PLUGIN = """
import pathlib
import torch
from tests import gpu_results

torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 2
torch.cuda.get_device_name = lambda: "NVIDIA H200"
gpu_results.RESULTS = pathlib.Path(__file__).parent / "results"
"""


@pytest.mark.parametrize(
    ("broken", "outcome"), [(False, "1 passed, 1 failed, 1 skipped"), (True, "1 passed, 1 failed, 1 skipped, 1 error")]
)
def test_several_workers_write_one_file_of_gpu_tests(tmp_path, broken, outcome):
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "test_suite.py").write_text(SUITE)
    if broken:
        (tmp_path / "below" / "test_broken.py").write_text("import no_such_module")
    (tmp_path / "machine.py").write_text(PLUGIN)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "-p", "machine", "-p", "tests.gpu_results"]
    paths = os.pathsep.join([str(tmp_path), str(root)])
    # Which pytest, and what it is told by whoever runs this one, is none of the suite's business.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"PYTHONPATH": paths}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    (file,) = (tmp_path / "results").iterdir()
    assert str(file) in done.stdout
    assert file.name.endswith("-2xNVIDIA-H200-gpu-tests.md")
    text = file.read_text()
    assert f"Outcome: {outcome}\n" in text
    assert ("test_broken.py" in text) == broken
    assert "| peak memory | 1.5 GiB |" in text
    assert "elsewhere" not in text
