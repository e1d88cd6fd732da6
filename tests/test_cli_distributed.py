"""The example's configs over two gloo processes: DDP from flags, FSDP2 from its file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from examples.model import LlamaModule
from lightning_int8 import consolidate_checkpoint
from tests.faulty_run import text
from tests.two_processes import launch, logs

CONFIGS = Path(__file__).parents[1] / "examples" / "configs"
SMALL = {"vocab_size": 300, "dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 96, "max_seq_len": 32}


def fit(folder: Path, name: str, *arguments: str) -> Path:
    checkpoints = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {"dirpath": str(folder / name), "filename": "last", "every_n_train_steps": 3},
    }
    data = {"path": str(text(folder)), "cache_dir": str(folder / "cache"), "sequence_length": 32, "batch_size": 4}
    changes = {
        "trainer": {
            **{"accelerator": "cpu", "max_steps": 3, "limit_val_batches": 0, "logger": False},
            **{"enable_progress_bar": False, "enable_model_summary": False, "callbacks": [checkpoints]},
        },
        "model": {"init_args": {"config": SMALL, "warmup_steps": 2, "compile": None}},
        "data": {"init_args": {**data, "vocab_size": 300}},
    }
    (folder / "changes.yaml").write_text(yaml.safe_dump(changes))
    command = ["fit", "--config", str(CONFIGS / "tiny.yaml"), *arguments, "--config", str(folder / "changes.yaml")]
    if any(launch("tests.cli_worker", folder / f"{name} logs", *command)):
        pytest.fail(logs(folder / f"{name} logs"))
    return folder / name / "last.ckpt"


def test_fsdp2_from_its_file_trains_as_ddp_does(tmp_path) -> None:
    ddp = fit(tmp_path, "ddp", "--trainer.strategy", "ddp", "--trainer.devices", "2")
    fsdp2 = fit(tmp_path, "fsdp2", "--config", str(CONFIGS / "fsdp2.yaml"))
    assert fsdp2.is_dir()
    consolidate_checkpoint(fsdp2, tmp_path / "whole.ckpt")
    first, second = (LlamaModule.load_from_checkpoint(path) for path in (ddp, tmp_path / "whole.ckpt"))
    start = LlamaModule(first.config)
    for (name, a), b, c in zip(first.named_parameters(), second.parameters(), start.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)
        assert not torch.allclose(a, c)
