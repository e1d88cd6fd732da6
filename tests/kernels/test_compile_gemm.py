"""Every GEMM kernel with every tile of the table compiles for every architecture, fits its chip and spills nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from lightning_int8.kernels import tile_table, tiles

ARCHITECTURES = (80, 86, 89, 90, 100, 120)


@pytest.mark.parametrize("capability", ARCHITECTURES)
def test_kernels_compile_fit_and_do_not_spill(capability):
    # In a process of its own, as this one may interpret kernels.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.compile_gemm", str(capability)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root, timeout=280)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " 0 that spill or do not fit" in done.stdout


@pytest.mark.parametrize("capability", [75, *tiles.SHARED_MEMORY, 130])
def test_every_form_has_tiles_that_fit(capability):
    limit = tiles.SHARED_MEMORY.get(capability, 99 << 10)
    for key in next(iter(tile_table.TILES.values())):
        block = int(key.removeprefix("block")) if key.startswith("block") else 128
        listed = tiles.candidates(capability, key, block)
        assert listed, (capability, key)
        assert any(t.takes_addend for t in listed)
        assert all(t.shared_memory(block) <= limit for t in listed)
        areas = [t.rows * t.columns for t in listed]
        assert areas == sorted(areas, reverse=True)


def test_small_products_take_small_tiles(monkeypatch):
    monkeypatch.setattr(tiles, "chip", lambda device: (90, 132))
    device = torch.device("cuda")
    large = tiles.choose("row", 16384, 4096, 128, False, False, device)
    small = tiles.choose("row", 256, 1024, 128, False, False, device)
    added = tiles.choose("row", 16384, 4096, 128, False, True, device)
    assert large.rows * large.columns > small.rows * small.columns
    assert added.takes_addend
    assert tiles.choose("row", 1, 1, 32, True, False, device) == tiles.candidates(90, "row_both", 32)[-1]
