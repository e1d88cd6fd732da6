"""The command that probes a checkpoint: the example's, one of transformers, and a module and data of one's own."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from examples.model import LlamaModule
from lightning_int8.probe import methods
from lightning_int8.probe_cli import main, parse_arguments
from tests.test_probe import SMALL


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint of the example's module, and the config that made it."""
    module = LlamaModule(config=SMALL)
    file = tmp_path / "last.ckpt"
    torch.save({"state_dict": module.state_dict(), "pytorch-lightning_version": L.__version__}, file)
    text = tmp_path / "text"
    text.mkdir()
    for i in range(20):
        (text / f"{i}.txt").write_text(" ".join(str(i * j % 97) for j in range(600)))
    config = {
        "trainer": {"max_steps": 1},
        "ckpt_path": None,
        "model": {
            "class_path": "examples.model.LlamaModule",
            "init_args": {"config": dataclasses.asdict(SMALL)},
        },
        "data": {
            "class_path": "examples.data.TextDataModule",
            "init_args": {
                "path": "/nowhere", "sequence_length": 64, "vocab_size": 300, "val_fraction": 0.3,
                "cache_dir": str(tmp_path / "cache"),
            },
        },
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return file, tmp_path / "config.yaml", text


def test_command_on_a_checkpoint(checkpoint, tmp_path, capsys):
    file, config, text = checkpoint
    out = tmp_path / "out"
    arguments = ["--ckpt", file, "--config", config, "--data", text, "--device", "cpu", "--output", out]
    result = main([str(argument) for argument in arguments])
    printed = capsys.readouterr().out
    assert "float8 rowwise" in printed
    assert "down_proj" in printed
    with open(out / "probe.csv", newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert len(rows) == 14 * len(methods())
    first = rows[0]
    assert first["linear"] == "model.layers.0.attention.q_proj"
    assert float(first["slope_dw_small"]) == pytest.approx(result.linears[0].slope[first["method"]][1], abs=1e-4)
    assert float(first["sqnr_y_db"]) == pytest.approx(result.linears[0].sqnr[first["method"]][0], abs=0.01)
    with open(out / "summary.csv", newline="") as lines:
        summary = {row["method"]: row for row in csv.DictReader(lines)}
    worst = min(float(row["sqnr_dw_db"]) for row in rows if row["method"] == "row")
    assert float(summary["row"]["sqnr_dw_db_worst"]) == worst
    assert float(summary["row"]["small_kept_worst"]) == min(
        float(row["small_kept"]) for row in rows if row["method"] == "row"
    )
    assert float(summary["row"]["slope_dx_small_worst"]) == min(
        float(row["slope_dx_small"]) for row in rows if row["method"] == "row"
    )
    assert float(summary["row"]["kl_nats"]) == pytest.approx(result.kl["row"], rel=1e-3)
    assert (out / "probe.png").stat().st_size > 10_000


def test_command_on_a_model_of_transformers(tmp_path, capsys):
    pytest.importorskip("transformers")
    from tests.test_examples_finetune import WORDS, save_model

    text = tmp_path / "text.txt"
    text.write_text(WORDS * 60)
    folder = save_model(tmp_path / "model", text, tied=True)
    arguments = ["--ckpt", folder, "--data", text, "--device", "cpu", "--output", tmp_path / "out", "--samples", 2]
    result = main([str(argument) for argument in [*arguments, "--length", 32]])
    assert [row.name.rsplit(".", 1)[1] for row in result.linears] == [
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    ]  # fmt: skip
    assert result.linears[0].shape == (64, 64, 64)
    assert 0 < result.kl["row"] < result.kl["float8 rowwise"]
    result = main([str(argument) for argument in [*arguments, "--length", 32, "--methods", "float8 rowwise", "block"]])
    assert list(result.kl) == ["float8 rowwise", "block"]
    with pytest.raises(SystemExit, match="unknown 'blok'; there are: 'row', 'block'"):
        main([str(argument) for argument in [*arguments, "--methods", "row", "blok"]])
    with pytest.raises(SystemExit, match="fewer than --length=100000"):
        main([str(argument) for argument in [*arguments, "--length", 100_000]])


def test_command_refuses_what_it_cannot_read(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    file, config, _ = checkpoint
    for arguments, message in (
        (["--ckpt", tmp_path / "none.ckpt"], "does not exist"),
        (["--ckpt", file], "--config must name"),
        (["--ckpt", tmp_path], "needs --data"),
        (["--ckpt", file, "--samples", 0], "argument --samples: '0' must be an integer of at least 1"),
        (["--ckpt", file, "--small", 1], "between 0 and 1"),
        (["--ckpt", file, "--config", tmp_path / "nope.yaml"], "nope.yaml does not exist"),
        (["--ckpt", file, "--config", config, "--device", "gpu"], "--device=gpu is no device"),
        (["--ckpt", file, "--config", config, "--device", "cuda"], "PyTorch sees no CUDA GPU here"),
    ):
        with pytest.raises(SystemExit):
            parse_arguments([str(argument) for argument in arguments])
        assert message in capsys.readouterr().err


class OwnModule(L.LightningModule):
    """As `lightning-int8 fit` takes it: no `lm_head`, logs, and makes its layers late, from what its Trainer knows."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.width = width

    def setup(self, stage: str) -> None:
        assert stage == "fit"
        self.make(getattr(self.trainer.datamodule, "classes", 10))

    def make(self, classes: int) -> None:
        self.net = nn.Sequential(nn.Linear(32, self.width), nn.ReLU())
        self.classes = classes

    def configure_model(self) -> None:
        if len(self.net) == 2:
            self.net.append(nn.Linear(self.width, self.classes))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> dict[str, Tensor] | None:
        x, y = batch[:2]
        loss = F.cross_entropy(self.net(x), y)
        self.log("loss", loss)
        return {"loss": loss} if self.width > 16 else None


class OwnData(L.LightningDataModule):
    """Has no `batch_size` and holds nothing out."""

    def setup(self, stage: str) -> None:
        assert stage == "fit"
        assert isinstance(self.trainer.lightning_module, OwnModule)
        self.classes = 10

    def train_dataloader(self) -> DataLoader:
        generator = torch.Generator().manual_seed(0)
        x, y = torch.randn(64, 32, generator=generator), torch.randint(10, (64,), generator=generator)
        return DataLoader(TensorDataset(x, y), batch_size=32)


class HeldOut(OwnData):
    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self.batch_size = batch_size

    def val_dataloader(self) -> list[DataLoader]:
        return [DataLoader(TensorDataset(torch.ones(16, 32), torch.ones(16).long()), batch_size=self.batch_size)]


class Packed(OwnData):
    """Its tensors are not of one length."""

    def train_dataloader(self) -> DataLoader:
        return DataLoader([[torch.randn(48, 32), torch.zeros(48).long(), torch.arange(7)]], batch_size=None)


class WithItsOwnData(OwnModule):
    """Needs no DataModule."""

    train_dataloader = OwnData.train_dataloader  # type: ignore[assignment]


def own(
    folder: Path, model: str = "OwnModule", data: str | None = "OwnData", width: int = 64, **init: Any
) -> list[str]:
    """The command's arguments for a checkpoint of it."""
    module = OwnModule(width)
    module.make(10)
    module.configure_model()
    torch.save({"state_dict": module.state_dict()}, folder / "own.ckpt")
    config: dict[str, Any] = {"model": {"class_path": f"tests.test_probe_cli.{model}", "init_args": {"width": width}}}
    if data is not None:
        config["data"] = {"class_path": f"tests.test_probe_cli.{data}", "init_args": init}
    (folder / "own.yaml").write_text(yaml.safe_dump(config))
    return [
        "--ckpt", str(folder / "own.ckpt"), "--config", str(folder / "own.yaml"), "--device", "cpu", "--methods", "row",
        "--output", str(folder / "out"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("model", "data", "init"),
    [("OwnModule", "OwnData", {}), ("OwnModule", "HeldOut", {"batch_size": 16}), ("WithItsOwnData", None, {})],
)
@pytest.mark.filterwarnings("error:You are trying to")
def test_a_module_and_data_of_ones_own(tmp_path, capfd, model, data, init):
    result = main([*own(tmp_path, model, data, **init), "--samples", "8"])
    assert [row.name for row in result.linears] == ["net.0", "net.2"]
    assert [row.shape for row in result.linears] == [(8, 32, 64), (8, 64, 10)]
    printed = capfd.readouterr()
    assert ("No held-out data" in printed.out) == (data != "HeldOut")
    assert "deprecated" not in printed.err


def test_batches_that_are_not_of_samples_are_taken_whole(tmp_path, capsys):
    result = main([*own(tmp_path, data="Packed"), "--samples", "2"])
    assert result.linears[0].shape == (48, 32, 64)
    assert "--samples=2 is not used: the batch's tensors have first sizes of 7 to 48" in capsys.readouterr().out


def test_errors_of_a_config_are_one_line(tmp_path, capsys):
    arguments = own(tmp_path)
    config, file = tmp_path / "own.yaml", tmp_path / "own.ckpt"
    for more, message in (
        (["--ignore", "nett"], "--ignore: the pattern 'nett' matches no module. Names like it: net"),
        (["--data", "text"], "Option 'path' is not accepted"),
        (["--methods", "row, nothing"], "unknown 'row, nothing'; there are: 'row', 'block', "),
    ):
        with pytest.raises(SystemExit) as error:
            main([*arguments, *more])
        assert message in str(error.value)
        assert "\n" not in str(error.value)
    with pytest.raises(SystemExit, match="training_step returned no loss"):
        main(own(tmp_path, width=16))
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(SystemExit, match="is corrupted"):
        main(arguments)
    config.write_text("model: {class_path: a.B, init_args: {c: '${d}'}}")
    with pytest.raises(SystemExit, match=r"own\.yaml: Interpolation key 'd' not found"):
        main(arguments)
    config.write_text("trainer: {}")
    with pytest.raises(SystemExit, match="names no model"):
        main(arguments)
