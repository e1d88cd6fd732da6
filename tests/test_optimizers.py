"""8-bit optimizers of torchao and bitsandbytes, chosen in YAML beside the plugin, saved and resumed; on a CPU."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

from lightning_int8.cli import main
from tests import small_config
from tests.small_config import CONFIGS


def fit(folder: Path, run: str, optimizer: str, *arguments: str) -> dict:
    """Six steps of the tiny config with the 8-bit one over it; returns the last checkpoint."""
    files = CONFIGS / "tiny.yaml", CONFIGS / "adamw-8bit.yaml", small_config.write(folder, run, 6, optimizer=optimizer)
    main(["fit", *(part for file in files for part in ("--config", str(file))), *arguments])
    return torch.load(folder / run / "step=6.ckpt", map_location="cpu", weights_only=True)


@pytest.mark.parametrize("name", ["torchao.optim.AdamW8bit", "bitsandbytes.optim.AdamW8bit"])
def test_a_run_with_8bit_states_resumes_exactly(tmp_path, monkeypatch, name: str) -> None:
    pytest.importorskip(name.partition(".")[0])
    # torchao compiles its step, for half a minute on a CPU.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    whole = fit(tmp_path, "whole", name)
    resumed = fit(tmp_path, "resumed", name, "--ckpt_path", str(tmp_path / "whole" / "step=3.ckpt"))
    assert resumed["global_step"] == whole["global_step"] == 6
    torch.testing.assert_close(resumed["state_dict"], whole["state_dict"], rtol=0, atol=0)

    (optimizer,) = whole["optimizer_states"]
    states = [state for state in optimizer["state"].values() if "8bit" in repr(state) or "uint8" in repr(state)]
    # Every matrix of 4,096 elements or more: in both layers q, o, gate, up, down; the embedding and the head.
    assert len(states) == 12
    rates = [float(group["lr"]) for group in optimizer["param_groups"]]
    assert rates == pytest.approx([float(rate) for rate in whole["lr_schedulers"][0]["_last_lr"]])
    assert len(set(rates)) == 1
    assert rates[0] < 1e-3
