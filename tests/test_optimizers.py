"""8-bit optimizers of torchao and bitsandbytes, chosen in YAML beside the plugin, saved and resumed; on a CPU."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
import yaml

from lightning_int8.cli import main
from tests.faulty_run import text

CONFIGS = Path(__file__).parents[1] / "examples" / "configs"
SMALL = {"vocab_size": 300, "dim": 64, "n_layers": 1, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 96, "max_seq_len": 32}


def fit(folder: Path, run: str, optimizer: str, steps: int, *arguments: str) -> dict:
    """Runs the tiny config with the 8-bit one over it, made smaller; returns the last checkpoint."""
    checkpoints = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {"dirpath": str(folder / run), "filename": "{step}", "every_n_train_steps": 3, "save_top_k": -1},
    }
    data = {"path": str(text(folder)), "cache_dir": str(folder / "cache"), "sequence_length": 32, "batch_size": 4}
    changes = {
        "trainer": {
            **{"accelerator": "cpu", "max_steps": steps, "limit_val_batches": 0, "logger": False},
            **{"enable_progress_bar": False, "enable_model_summary": False, "callbacks": [checkpoints]},
        },
        "model": {"init_args": {"config": SMALL, "warmup_steps": 2, "optimizer": optimizer}},
        "data": {"init_args": {**data, "vocab_size": 300}},
    }
    (folder / "changes.yaml").write_text(yaml.safe_dump(changes))
    files = CONFIGS / "tiny.yaml", CONFIGS / "adamw-8bit.yaml", folder / "changes.yaml"
    main(["fit", *(part for file in files for part in ("--config", str(file))), *arguments])
    return torch.load(folder / run / f"step={steps}.ckpt", map_location="cpu", weights_only=True)


@pytest.mark.parametrize("name", ["torchao.optim.AdamW8bit", "bitsandbytes.optim.AdamW8bit"])
def test_a_run_with_8bit_states_resumes_exactly(tmp_path, monkeypatch, name: str) -> None:
    pytest.importorskip(name.partition(".")[0])
    # torchao compiles its step, for half a minute on a CPU.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    whole = fit(tmp_path, "whole", name, 6)
    resumed = fit(tmp_path, "resumed", name, 6, "--ckpt_path", str(tmp_path / "whole" / "step=3.ckpt"))
    assert resumed["global_step"] == whole["global_step"] == 6
    torch.testing.assert_close(resumed["state_dict"], whole["state_dict"], rtol=0, atol=0)

    (optimizer,) = whole["optimizer_states"]
    states = [state for state in optimizer["state"].values() if "8bit" in repr(state) or "uint8" in repr(state)]
    # Every matrix of 4,096 elements or more: q, o, gate, up, down, the embedding and the head.
    assert len(states) == 7
    rates = [float(group["lr"]) for group in optimizer["param_groups"]]
    assert rates == pytest.approx([float(rate) for rate in whole["lr_schedulers"][0]["_last_lr"]])
    assert len(set(rates)) == 1
    assert rates[0] < 1e-3
