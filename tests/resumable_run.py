"""A small training run as a process of its own, for tests that kill it.

    python -m tests.resumable_run FOLDER RECIPE STEPS [CHECKPOINT]

Appends `step loss` of every step to `FOLDER/losses.txt` at once, and saves `FOLDER/checkpoints/last.ckpt` now and then.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from examples.data import TextDataModule
from examples.llama import LlamaConfig
from examples.model import LlamaModule
from lightning_int8 import FallbackInt8Precision

WORDS = list("abcdefghijklmnopqrstuvwxyz")


class LossFile(Callback):
    """Writes each step's loss as an exact hexadecimal float, so that a killed run's are on disk."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        with open(self.file, "a") as out:
            out.write(f"{trainer.global_step} {float(outputs['loss']).hex()}\n")


def run(folder: Path, recipe: str, steps: int, checkpoint: Path | None = None) -> None:
    """Trains ``steps`` steps in all, from ``checkpoint`` where given; an epoch has about 20."""
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    text = folder.parent / "text.txt"
    if not text.exists():
        choose = random.Random(0)
        text.write_text("\n".join(" ".join(choose.choice(WORDS) for _ in range(12)) for _ in range(420)))
    L.seed_everything(0, verbose=False)
    config = LlamaConfig(vocab_size=300, dim=64, n_layers=1, n_heads=4, n_kv_heads=2, ffn_dim=96, max_seq_len=32)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        plugins=FallbackInt8Precision(recipe=recipe, precision="32-true", ignore_modules=["lm_head"]),
        callbacks=[
            LossFile(folder / "losses.txt"),
            ModelCheckpoint(
                dirpath=folder / "checkpoints", filename="last", every_n_train_steps=7, enable_version_counter=False
            ),
        ],
        gradient_clip_val=1.0,
        val_check_interval=9,
        check_val_every_n_epoch=None,
        limit_val_batches=2,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = TextDataModule(
        path=str(text), sequence_length=32, batch_size=8, vocab_size=300, cache_dir=str(folder.parent / "cache")
    )
    trainer.fit(LlamaModule(config, warmup_steps=5), datamodule=data, ckpt_path=checkpoint)


if __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]) if len(sys.argv) > 4 else None)
