"""One of two or four processes: our Llama under tensor parallelism, of four with FSDP2 across it.

Started with torchrun's environment variables for `test_tensor_parallel_stacks.py`:
`python -m tests.tensor_parallel_stack_worker FOLDER DEVICE PART...`; DEVICE is `cpu` or `gpu`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.utils.data import DataLoader

from examples.model import one_by_one_on_several_meshes, parallelize
from lightning_int8 import FallbackInt8Precision, consolidate_checkpoint
from lightning_int8.plugin_core import clip_grad_norm
from tests.stack_worker import BATCH, LENGTH, VOCABULARY, Module
from tests.tiny import NEAREST_RECIPE, thresholds, trainer
from tests.two_processes import add_up_in_order

STEPS = 6
CLIP = 0.5
VARIANTS = ("eager", "checkpointed", "compiled", "compiled and checkpointed")
# How checkpoints are saved in the middle of a run.
SAVED = ("full", "sharded")


class OneDevice(Module):
    """Each rank that takes other samples sees one batch, again and again; one device sees all of them as one."""

    def __init__(self, variant: str = "eager", steps: int = STEPS, ranks: int = 1) -> None:
        super().__init__("ours", variant)
        self.steps, self.batch_size = steps, ranks * BATCH
        self.norms: list[float] = []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # At 1e-2 runs that differ in rounding part by 2 % within six steps.
        return torch.optim.AdamW(self.parameters(), lr=5e-3)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.norms.append(clip_grad_norm(self.parameters(), float("inf")).item())
        # Lightning's own plugins cannot clip here: some weights are plain tensors beside the DTensors.
        if not isinstance(self.trainer.precision_plugin, FallbackInt8Precision):
            clip_grad_norm(self.parameters(), CLIP)

    def train_dataloader(self) -> DataLoader:
        rank = (self.trainer.distributed_sampler_kwargs or {"rank": 0})["rank"]
        rows = [rank * self.batch_size + row for row in range(self.batch_size)]
        return DataLoader(tokens(), self.batch_size, sampler=self.steps * rows)


class Parallel(OneDevice):
    def configure_model(self) -> None:
        parallelize(self.model, self.device_mesh)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # As by default on a GPU.
        optimizer = torch.optim.AdamW(self.parameters(), lr=5e-3, foreach=True)
        one_by_one_on_several_meshes([optimizer])
        return optimizer

    def on_train_start(self) -> None:
        one_by_one_on_several_meshes(self.trainer.optimizers)


def tokens() -> Tensor:
    return torch.randint(VOCABULARY, (2 * BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(0))


def plugin() -> FallbackInt8Precision:
    return FallbackInt8Precision(NEAREST_RECIPE, "32-true", ignore_modules=["lm_head"])


def run(
    folder: Path, device: str, variant: str, *, int8: bool = True, steps: int = STEPS, sharded: bool = False,
    save: Path | None = None, resume: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    module, ranks = Parallel(variant, steps), int(os.environ["WORLD_SIZE"])
    strategy = ModelParallelStrategy(
        data_parallel_size=ranks // 2, tensor_parallel_size=2, save_distributed_checkpoint=sharded
    )
    options: dict[str, Any] = {"accelerator": device, "devices": ranks, "strategy": strategy}
    options |= {"gradient_clip_val": CLIP if int8 else None, "max_epochs": 1 if resume is None else 2}
    fit = trainer(folder, plugin=plugin() if int8 else None, use_distributed_sampler=False, **options)
    fit.fit(module, ckpt_path=resume)
    if save is not None:
        fit.save_checkpoint(save)
    tables = {name: table.cpu() for name, table in thresholds(module).items()}
    return {"losses": module.losses, "norms": module.norms, "graphs": module.graphs, "thresholds": tables}


def main() -> None:
    folder, device, parts = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    torch.set_num_threads(1)
    add_up_in_order(device)
    results = {}
    if "variants" in parts:
        results["full precision"] = run(folder, device, "eager", int8=False)
        for variant in VARIANTS:
            results[variant] = run(folder, device, variant)
    if "checkpoints" in parts:
        for name in SAVED:
            # Beside the folder, where the test resumes them on one device.
            saved, options = folder.parent / name, {"steps": STEPS // 2, "sharded": name == "sharded"}
            run(folder, device, "eager", save=saved, **options)
            results[f"{name}, resumed"] = run(folder, device, "eager", resume=saved, **options)
        if dist.get_rank() == 0:
            consolidate_checkpoint(folder.parent / "sharded", folder.parent / "consolidated")
    torch.save(results, folder / f"rank{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
