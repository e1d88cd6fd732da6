"""One of two processes: Fabric with DDP, FSDP1 and FSDP2, each saved and resumed, for `test_fabric_distributed.py`.

Started with torchrun's environment variables: `python -m tests.fabric_worker FOLDER DEVICE`; DEVICE is `cpu` or `gpu`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn import functional as F

from lightning_int8 import FabricFallbackInt8Precision
from tests.tiny import BATCH, GPU_RECIPE, Block, TinyModel, batches, thresholds

CLIP = 0.3
STRATEGIES = ("ddp", "fsdp1", "fsdp2")


class CpuFSDPStrategy(FSDPStrategy):
    """FSDP1, which Lightning offers on accelerators only, on the CPU."""

    def setup_module(self, module: nn.Module) -> nn.Module:
        return FullyShardedDataParallel(module, device_id=torch.device("cpu"), **self._fsdp_kwargs)


def shard(module: Any, mesh: Any) -> nn.Module:
    for layer in module.layers:
        fully_shard(layer, mesh=mesh["data_parallel"])
    return fully_shard(module, mesh=mesh["data_parallel"])


def strategy(kind: str, device: str) -> Any:
    if kind == "ddp":
        return DDPStrategy()
    if kind == "fsdp1":
        return (CpuFSDPStrategy if device == "cpu" else FSDPStrategy)(auto_wrap_policy={Block})
    return ModelParallelStrategy(shard, data_parallel_size=2, tensor_parallel_size=1)


def run(kind: str, device: str, steps: range, resume: Path | None = None, save: Path | None = None) -> dict[str, Any]:
    """Trains ``steps`` of six, clipping the gradients' norm."""
    plugin = FabricFallbackInt8Precision(GPU_RECIPE, precision="32-true")
    fabric = Fabric(accelerator=device, devices=2, strategy=strategy(kind, device), plugins=plugin)
    fabric.launch()
    torch.manual_seed(1)
    model = fabric.setup_module(TinyModel())
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=1e-2))
    state = {"model": model, "optimizer": optimizer}
    if resume is not None:
        plugin.load_state_dict(fabric.load(resume, state)["int8"])
    x, y = batches(12)
    losses, norms = [], []
    for step in steps:
        rows = slice((2 * step + fabric.global_rank) * BATCH, (2 * step + fabric.global_rank + 1) * BATCH)
        loss = F.cross_entropy(model(fabric.to_device(x[rows])), fabric.to_device(y[rows]))
        fabric.backward(loss)
        norm = fabric.clip_gradients(model, optimizer, max_norm=CLIP)
        norms.append((norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    if save is not None:
        fabric.save(save, state | {"int8": plugin.state_dict()})
    tables = {name: table.cpu() for name, table in thresholds(model).items()}
    return {"losses": losses, "norms": norms, "thresholds": tables}


def main() -> None:
    folder, device = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for kind in STRATEGIES:
        results[kind] = run(kind, device, range(6))
        run(kind, device, range(3), save=folder / kind)
        results[f"{kind} resumed"] = run(kind, device, range(3, 6), resume=folder / kind)
    torch.save(results, folder / f"rank{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
