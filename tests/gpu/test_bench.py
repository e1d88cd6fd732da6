"""The benchmark on a GPU: every product checked and timed, and the kernels' names read as what they are."""

from __future__ import annotations

import json

import pytest
import torch

from lightning_int8.bench import gemm
from lightning_int8.bench.cli import main

pytestmark = pytest.mark.gpu


def test_every_product_runs_in_8_bits_and_beside_bf16(tmp_path) -> None:
    arguments = "--sections gemm linear --shapes 1024,512 --tokens 2048 --recipes row block --peers --compile-workers 3"
    assert main([*arguments.split(), "--output", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("*.json")
    results = json.loads(file.read_text())
    compiled = results["about"]["compiled_ahead"]
    assert compiled["errors"] == []
    assert compiled["ended"] > 3
    assert [line["product"] for line in results["gemm"]] == ["forward", "dgrad", "wgrad"]
    peers = gemm.peers(torch.device("cuda"))
    for line in results["gemm"] + results["linear"]:
        for name, cell in line["cells"].items():
            assert "error" not in cell, (name, cell)
            assert cell["ms"] > 0
            if name in peers or name in ("row", "block"):
                assert "low_precision_share" not in cell or cell["low_precision_share"] > 0.9, (name, cell)


def test_a_compiled_step_counts_the_kernels_of_its_layers(tmp_path) -> None:
    arguments = "--sections step --config tests.test_bench:llama --tokens 512 --recipes row --peers --compile-workers 0"
    assert main([*arguments.split(), "--output", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("*.json")
    (line,) = json.loads(file.read_text())["step"]
    assert line["cells"]["row"]["peak_gib"] > 0
    assert 0.0 < line["cells"]["row"]["low_precision_share"] < 1.0
    assert "low_precision_share" not in line["cells"]["bf16"]
