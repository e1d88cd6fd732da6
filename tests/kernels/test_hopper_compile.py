"""The Hopper GEMMs compile for sm_90 on any machine: no spills, within shared memory, on the INT8 tensor cores."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from lightning_int8.kernels import backends

CUDA = torch.device("cuda", 0)


@pytest.mark.slow
def test_every_form_compiles_without_spills():
    pytest.importorskip("triton.experimental.gluon.nvidia.hopper")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_hopper"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert done.stdout.count("ok ") == 26, done.stdout


@pytest.mark.parametrize(
    ("capability", "gluon", "chosen"),
    [
        ((9, 0), None, "hopper"),
        ((9, 0), "it is too old.", "triton"),
        ((8, 0), None, "triton"),
        ((10, 0), None, "triton"),
    ],
)
def test_auto_takes_the_fastest_that_runs_and_says_why_not(monkeypatch, caplog, capability, gluon, chosen):
    monkeypatch.delenv(backends.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(backends, "_capability", lambda index: capability)
    monkeypatch.setattr(backends, "_why_not_gluon", lambda: gluon)
    backends._say_once.cache_clear()
    assert backends.choose("auto", CUDA) == chosen
    assert backends.choose("auto", CUDA) == chosen
    assert len(caplog.records) == (chosen == "triton" and capability == (9, 0))


def test_forcing_hopper_elsewhere_says_why(monkeypatch):
    monkeypatch.setattr(backends, "_capability", lambda index: (8, 9))
    with pytest.raises(RuntimeError, match=r"8\.9, not 9\.0"):
        backends.choose("hopper", CUDA)


def test_the_installed_gluon_fits():
    assert backends._why_not_gluon() is None
