"""The example's configs over two gloo processes: DDP from flags, FSDP2 from its file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from examples.model import LlamaModule
from lightning_int8 import consolidate_checkpoint
from tests import small_config
from tests.small_config import CONFIGS
from tests.two_processes import launch, logs


def fit(folder: Path, name: str, *arguments: str) -> Path:
    changes = small_config.write(folder, name, 3, compile=None)
    command = ["fit", "--config", str(CONFIGS / "tiny.yaml"), *arguments, "--config", str(changes)]
    if any(launch("tests.cli_worker", folder / f"{name} logs", *command)):
        pytest.fail(logs(folder / f"{name} logs"))
    return folder / name / "step=3.ckpt"


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
