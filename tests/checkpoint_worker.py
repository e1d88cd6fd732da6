"""One of two processes: resumes every strategy's checkpoints in every other strategy, for `test_checkpoints.py`.

Started with torchrun's environment variables: `python -m tests.checkpoint_worker FOLDER DEVICE KIND...`. FOLDER takes
the results; its parent holds `single`, a checkpoint of one device after its first phase, and takes the others. A phase
is three steps on data of its own. DEVICE is `cpu` (gloo) or `gpu` (NCCL), KIND (`ddp`, `fsdp1`, `fsdp2`) is the
strategy whose checkpoints are written and resumed.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
import torch.distributed.fsdp
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel, api
from torch.utils.data import DataLoader, TensorDataset

from lightning_int8 import FallbackInt8Precision, Int8Recipe, VerifiedCheckpointIO, consolidate_checkpoint
from lightning_int8.plugin_core import clip_grad_norm
from tests.distributed_worker import CpuFSDPStrategy, Sharded
from tests.tiny import BATCH, GPU_RECIPE, NEAREST_RECIPE, Block, TinyModule, batches, thresholds, trainer

STEPS = 3
CLIP = 0.3
STRATEGIES = ("ddp", "fsdp1", "fsdp1-sharded", "fsdp2", "fsdp2-sharded")
# Which checkpoints are resumed in which strategies.
ANY = ("ddp", "fsdp1", "fsdp2")
PAIRS = {
    **dict.fromkeys(("ddp", "fsdp1", "fsdp2", "fsdp1-consolidated", "fsdp2-consolidated"), ANY),
    "fsdp1-sharded": ("fsdp1",),
    "fsdp2-sharded": ("fsdp2",),
}
PLAIN = ("ddp", "fsdp1-sharded", "fsdp2-sharded")
# Where which AdamW8bit can be saved and resumed.
EIGHT_BITS = {"ddp": ("torchao", "bitsandbytes"), "fsdp2-sharded": ("torchao",)}


class Phase(TinyModule):
    def __init__(self, phase: int, optimizer: Any) -> None:
        super().__init__(steps=2 * STEPS)
        self.phase, self.optimizer = phase, optimizer

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters(), lr=1e-2)

    def train_dataloader(self) -> DataLoader:
        """Each rank its half of the batches; one device all, in turn."""
        order = torch.arange(2 * STEPS * BATCH).view(STEPS, 2, BATCH)
        mine = order if self.trainer.world_size == 1 else order[:, self.trainer.global_rank]
        data = TensorDataset(*batches(2 * STEPS, seed=self.phase))
        return DataLoader(data, batch_size=BATCH, sampler=mine.flatten().tolist())


class ShardedPhase(Phase, Sharded):
    pass


class OneDevicePhase(Phase):
    """Does on one device what two ranks do: the mean of the gradients of their batches."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        # Lightning divides it by the two accumulated batches, and a rank does not: thresholds are of its gradients.
        return 2 * super().training_step(batch, batch_idx)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        for parameter in self.parameters():
            parameter.grad *= 0.5


class ClippedNorms(pl.Callback):
    """The norm of all gradients, over all shards, after each step, where they are still there."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.fit_loop._should_accumulate():
            return
        root = trainer.strategy.model
        if isinstance(root, FullyShardedDataParallel):
            norm = root.clip_grad_norm_(float("inf"))
        else:
            norm = clip_grad_norm(pl_module.parameters(), float("inf"))
        self.norms.append(norm.item())


def strategy(name: str, device: str) -> Any:
    kind, _, sharded = name.partition("-")
    if kind == "ddp":
        return DDPStrategy()
    if kind == "fsdp1":
        cls = CpuFSDPStrategy if device == "cpu" else FSDPStrategy
        return cls(auto_wrap_policy={Block}, state_dict_type="sharded" if sharded else "full")
    return ModelParallelStrategy(
        data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=bool(sharded)
    )


def run(
    folder: Path,
    device: str,
    name: str,
    phase: int,
    resume: Path | None,
    *,
    int8: bool = True,
    recipe: Int8Recipe = NEAREST_RECIPE,
    save: Path | None = None,
    optimizer: Any = torch.optim.AdamW,
) -> dict[str, Any]:
    """Trains one phase; ``name`` is one of ``STRATEGIES`` or ``"single"``."""
    plugins: list[Any] = [FallbackInt8Precision(recipe, "32-true")] if int8 else []
    if name == "ddp":
        plugins.append(VerifiedCheckpointIO())
    options: dict[str, Any] = {"accelerator": device, "max_epochs": phase + 1, "use_distributed_sampler": False}
    # Lightning does not clip norms under FSDP1 without the plugin.
    options |= {"gradient_clip_val": CLIP if int8 else None}
    if name == "single":
        model: Phase = OneDevicePhase(phase, optimizer)
        options |= {"accumulate_grad_batches": 2}
    else:
        model = (ShardedPhase if name.startswith("fsdp2") else Phase)(phase, optimizer)
        options |= {"devices": 2, "strategy": strategy(name, device)}
    clipped = ClippedNorms()
    run = trainer(folder, plugin=plugins, callbacks=[clipped], **options)
    run.fit(model, ckpt_path=resume)
    if save is not None:
        run.save_checkpoint(save)
    tables = {name: table.cpu() for name, table in thresholds(model).items()}
    return {"losses": model.losses, "norms": clipped.norms, "thresholds": tables}


def without_offload() -> None:
    """FSDP1 crashes when it offloads full states from a CPU to the CPU, which Lightning asks of it."""
    for module, name in ((torch.distributed.fsdp, "FullStateDictConfig"), (api, "FullOptimStateDictConfig")):
        cls = getattr(module, name)
        setattr(module, name, lambda offload_to_cpu, cls=cls, **options: cls(offload_to_cpu=False, **options))


def main() -> None:
    out, device, kinds = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    torch.set_num_threads(1)
    if device == "cpu":
        without_offload()
    results: dict[str, Any] = {}
    for kind in kinds:
        results |= every_run(out.parent, device, kind)
    torch.save(results, out / f"rank{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


def every_run(folder: Path, device: str, kind: str) -> dict[str, Any]:
    def of_kind(names: Iterable[str]) -> list[str]:
        return [name for name in names if name.partition("-")[0] == kind]

    results: dict[str, Any] = {}
    for name in of_kind(STRATEGIES):
        results[f"single > {name}"] = run(folder, device, name, 1, folder / "single", save=folder / name)
    if kind != "ddp" and dist.get_rank() == 0:
        consolidate_checkpoint(folder / f"{kind}-sharded", folder / f"{kind}-consolidated")
    dist.barrier()
    for source in of_kind(PAIRS):
        for target in PAIRS[source]:
            results[f"{source} > {target}"] = run(folder, device, target, 2, folder / source)
    # A run that takes up INT8, and one that leaves it.
    for name in of_kind(PLAIN):
        saved = folder / f"plain-{name}"
        results[f"single > plain {name}"] = run(folder, device, name, 1, folder / "single", int8=False, save=saved)
        results[f"plain {name} > {name}"] = run(folder, device, name, 2, saved)
        results[f"{name} > plain {name}"] = run(folder, device, name, 2, folder / name, int8=False)
        saved = folder / f"mixed-{name}"
        results[f"mixed {name}"] = run(folder, device, name, 1, folder / "mixed", recipe=GPU_RECIPE, save=saved)
        results[f"mixed {name}, resumed"] = run(folder, device, name, 2, saved, recipe=GPU_RECIPE)
    if device == "cpu":
        # torchao compiles its step, for half a minute.
        torch.compile = functools.partial(torch.compile, backend="eager")
        for name in of_kind(EIGHT_BITS):
            for package in EIGHT_BITS[name]:
                optimizer = importlib.import_module(f"{package}.optim").AdamW8bit
                saved = folder / f"{package} {name}"
                results[f"{name}, {package}"] = run(folder, device, name, 0, None, save=saved, optimizer=optimizer)
                results[f"{name}, {package}, resumed"] = run(folder, device, name, 1, saved, optimizer=optimizer)
    return results


if __name__ == "__main__":
    main()
