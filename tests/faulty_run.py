"""A small training run that can be made to die at a chosen point; see `test_faults.py`.

    python -m tests.faulty_run FOLDER DEVICE TASK...

Each task is `CHECKPOINTS:STEPS[:DEATH[:RESUME]]`: train up to STEPS optimizer steps with checkpoints in the folder
CHECKPOINTS and exact losses in `CHECKPOINTS/losses<rank>.txt`. DEATH is `step-N` (SIGKILL in the backward of step N),
`rank1-N` (the same, on rank 1 only) or `save-N` (the kernel ends the process in the middle of writing the checkpoint of
step N). RESUME names the checkpoint to start from. In a process started as one of two ranks the run is DDP, with DEVICE
`cpu` on gloo, with `gpu` on NCCL.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy

from examples.data import TextDataModule
from examples.llama import LlamaConfig
from examples.model import LlamaModule
from lightning_int8 import FallbackInt8Precision, VerifiedCheckpointIO
from tests.two_processes import add_up_in_order

EVERY = 4
# After how long without an answer NCCL ends the process; by default 30 minutes.
NCCL_TIMEOUT = timedelta(seconds=20)


class LossFile(Callback):
    """Writes each step's loss as an exact hexadecimal float at once."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        with open(self.file, "a") as out:
            out.write(f"{trainer.global_step} {float(outputs['loss']).hex()}\n")


class Death(Callback):
    """Ends this process where DEATH says."""

    def __init__(self, kind: str, step: int) -> None:
        self.kind, self.step = kind, step

    def on_before_backward(self, trainer: Any, module: Any, loss: Any) -> None:
        dying = self.kind == "step" or (self.kind == "rank1" and trainer.global_rank == 1)
        if dying and trainer.global_step + 1 == self.step:
            # In the middle: some gradients are there (and reduced, with two ranks), and others are not.
            weight = module.model.layers[0].attention.o_proj.weight
            weight.register_hook(lambda gradient: os.kill(os.getpid(), signal.SIGKILL))

    def on_save_checkpoint(self, trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
        if self.kind == "save" and trainer.global_step == self.step:
            # Python ignores the signal otherwise; the kernel sends it with the first byte past the limit.
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def text(folder: Path) -> Path:
    """Training text made up from letters, the same every time."""
    path = folder / "text.txt"
    if not path.exists():
        choose = random.Random(0)
        words = list("abcdefghijklmnopqrstuvwxyz")
        path.write_text("\n".join(" ".join(choose.choice(words) for _ in range(12)) for _ in range(420)))
    return path


def run(
    folder: Path,
    name: str,
    steps: int,
    death: str = "",
    resume: str = "",
    *,
    verified: bool = True,
    device: str = "cpu",
) -> LlamaModule:
    """Trains as the module's docstring says; ``verified`` chooses our checkpoint plugin over Lightning's own."""
    torch.set_num_threads(1)
    here = folder / name
    here.mkdir(parents=True, exist_ok=True)
    L.seed_everything(0, verbose=False)
    config = LlamaConfig(vocab_size=300, dim=64, n_layers=1, n_heads=4, n_kv_heads=2, ffn_dim=96, max_seq_len=32)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    callbacks: list[Callback] = [
        LossFile(here / f"losses{os.environ.get('RANK', '0')}.txt"),
        ModelCheckpoint(dirpath=here, filename="{step}", every_n_train_steps=EVERY, save_top_k=-1),
    ]
    if death:
        kind, _, step = death.partition("-")
        callbacks.append(Death(kind, int(step)))
    trainer = L.Trainer(
        accelerator=device,
        devices=ranks,
        strategy=DDPStrategy(timeout=NCCL_TIMEOUT if device == "gpu" else None) if ranks > 1 else "auto",
        max_steps=steps,
        plugins=[
            FallbackInt8Precision(recipe="row", precision="32-true", ignore_modules=["lm_head"]),
            VerifiedCheckpointIO() if verified else TorchCheckpointIO(),
        ],
        callbacks=callbacks,
        gradient_clip_val=1.0,
        accumulate_grad_batches=2,
        limit_val_batches=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = TextDataModule(
        path=str(text(folder)), sequence_length=32, batch_size=4, vocab_size=300, cache_dir=str(folder / "cache")
    )
    module = LlamaModule(config, warmup_steps=5)
    trainer.fit(module, datamodule=data, ckpt_path=folder / resume if resume else None)
    return module


def main() -> None:
    """Runs the tasks of the command line."""
    folder, device = Path(sys.argv[1]), sys.argv[2]
    add_up_in_order(device)
    for task in sys.argv[3:]:
        name, steps, death, resume = (*task.split(":"), "", "")[:4]
        run(folder, name, int(steps), death, resume, verified="lightning" not in name, device=device)


if __name__ == "__main__":
    main()
