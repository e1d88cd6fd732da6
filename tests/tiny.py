"""A model small enough to train in a test, as a LightningModule, and helpers around it."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_int8 import Int8Recipe, fallback_states
from lightning_int8.recipe import FIXED_BAND
from lightning_int8.threshold import THRESHOLD

WIDTH, CLASSES, BATCH = 64, 8, 64
# Blocks small enough that a tiny layer has several; each operand in a band of its own.
RECIPE = Int8Recipe(block_size=16, budget=None, activation_band=FIXED_BAND, gradient_band=FIXED_BAND)
# The smallest blocks that the GPU's kernels have.
GPU_RECIPE = dataclasses.replace(RECIPE, block_size=32)
# To compare strategies closely: the noise of stochastic rounding is a hash of all of the data's bits, and strategies
# differ in the last ones. Mixed, one such bit reaches 128 values, any of which may be rounded the other way then.
NEAREST_RECIPE = dataclasses.replace(GPU_RECIPE, stochastic_rounding="nothing", hadamard=False)
FAR = 1e10


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(width, 2 * width)
        self.down_proj = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down_proj(F.gelu(self.up_proj(x)))


class TinyModel(nn.Module):
    def __init__(self, width: int = WIDTH, depth: int = 2, reentrant: bool | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(width) for _ in range(depth))
        self.lm_head = nn.Linear(width, CLASSES, bias=False)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if self.reentrant is None:
                x = layer(x)
            else:
                x = checkpoint(layer, x, use_reentrant=self.reentrant)
        return self.lm_head(x)


def batches(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count * BATCH, WIDTH, generator=generator)
    return x, x[:, :CLASSES].argmax(1)


class TinyModule(pl.LightningModule):
    """Classifies; keeps each training loss in ``losses``."""

    def __init__(self, steps: int = 3, reentrant: bool | None = None, manual: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.model = TinyModel(reentrant=reentrant)
        self.steps = steps
        self.automatic_optimization = not manual
        self.losses: list[float] = []

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.model(x).float(), y)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.losses.append(loss.item())
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        self.manual_backward(loss)
        if batch_idx % 2 == 1:
            optimizer.step()
            optimizer.zero_grad()
        return None

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    test_step = validation_step

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self.model(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(*batches(self.steps)), batch_size=BATCH)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(*batches(1, seed=1)), batch_size=BATCH)

    test_dataloader = predict_dataloader = val_dataloader


class FarThresholds(pl.Callback):
    """Sets every threshold so high that each update divides it by the factor: the updates can be counted."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        set_far(pl_module)


def set_far(module: nn.Module) -> None:
    for state in fallback_states(module).values():
        for part in state.on(torch.device("cpu")):
            part[:, THRESHOLD] = FAR


def updates(module: nn.Module) -> set[int]:
    """How often thresholds have moved since ``set_far``; layers that saw no blocks for an operand are left out."""
    factor = RECIPE.threshold_factor
    counts = set()
    for state in fallback_states(module).values():
        for threshold, _, _, rate, _ in state.tensor.tolist():
            if not math.isnan(rate):
                counts.add(round(math.log(FAR / threshold, factor)))
    return counts


def trainer(tmp_path: Path, *, plugin: Any, **kwargs: Any) -> pl.Trainer:
    options: dict[str, Any] = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
        "plugins": plugin,
    }
    return pl.Trainer(**{**options, **kwargs})


def thresholds(module: nn.Module) -> dict[str, Tensor]:
    return {name: state.tensor for name, state in fallback_states(module).items() if state.tensor is not None}


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """Equal names and bit-equal tensors, where NaN equals NaN."""
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0, equal_nan=True, msg=name)
