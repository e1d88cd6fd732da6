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
from torch._dynamo.utils import counters
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn import functional as F

from lightning_int8 import FabricFallbackInt8Precision
from tests.checkpoint_worker import without_offload
from tests.tiny import BATCH, NEAREST_RECIPE, Block, TinyModel, batches, thresholds

CLIP = 0.3
STRATEGIES = ("ddp", "fsdp1", "fsdp2")
VARIANTS = ("compiled", "checkpointed", "compiled and checkpointed")


class CpuFSDPStrategy(FSDPStrategy):
    """FSDP1, which Lightning offers on accelerators only, on the CPU."""

    def setup_module(self, module: nn.Module) -> nn.Module:
        return FullyShardedDataParallel(module, device_id=torch.device("cpu"), **self._fsdp_kwargs)


def shard(module: Any, mesh: Any) -> nn.Module:
    for layer in module.layers:
        fully_shard(layer, mesh=mesh["data_parallel"])
    return fully_shard(module, mesh=mesh["data_parallel"])


def strategy(kind: str, device: str, full: bool) -> Any:
    if kind == "ddp":
        return DDPStrategy()
    if kind == "fsdp1":
        cls = CpuFSDPStrategy if device == "cpu" else FSDPStrategy
        return cls(auto_wrap_policy={Block}, state_dict_type="full" if full else "sharded")
    return ModelParallelStrategy(
        shard, data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=not full
    )


def run(
    kind: str,
    device: str,
    steps: range,
    *,
    variant: str = "",
    resume: Path | None = None,
    save: Path | None = None,
    full: bool = False,
) -> dict[str, Any]:
    """Trains ``steps`` of six, clipping the gradients' norm; ``full``: what is saved is one file."""
    plugin = FabricFallbackInt8Precision(NEAREST_RECIPE, precision="32-true")
    fabric = Fabric(accelerator=device, devices=2, strategy=strategy(kind, device, full), plugins=plugin)
    fabric.launch()
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(1)
    model = TinyModel(reentrant=False if "checkpointed" in variant else None)
    if "compiled" in variant:
        for layer in model.layers:
            layer.compile(backend="aot_eager")
    model = fabric.setup_module(model)
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=1e-2))
    state = {"model": model, "optimizer": optimizer}
    if resume is not None:
        plugin.load_state_dict(fabric.load(resume, state)["int8"])
    x, y = batches(12)
    losses, norms, graphs = [], [], []
    for step in steps:
        rows = slice((2 * step + fabric.global_rank) * BATCH, (2 * step + fabric.global_rank + 1) * BATCH)
        loss = F.cross_entropy(model(fabric.to_device(x[rows])), fabric.to_device(y[rows]))
        fabric.backward(loss)
        norm = fabric.clip_gradients(model, optimizer, max_norm=CLIP)
        norms.append((norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        graphs.append(counters["stats"]["unique_graphs"])
    if save is not None:
        fabric.save(save, state | {"int8": plugin.state_dict()})
    tables = {name: table.cpu() for name, table in thresholds(model).items()}
    return {"losses": losses, "norms": norms, "thresholds": tables, "graphs": graphs}


def main() -> None:
    folder, device = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    if device == "cpu":
        without_offload()
    results: dict[str, Any] = {}
    for kind in STRATEGIES:
        results[kind] = run(kind, device, range(6))
        for variant in VARIANTS:
            results[f"{kind}, {variant}"] = run(kind, device, range(3), variant=variant)
        for full in (False, True):
            saved = folder / f"{kind} {full}"
            run(kind, device, range(3), save=saved, full=full)
            name = f"{kind}, resumed from {'one file' if full else 'shards'}"
            results[name] = run(kind, device, range(3, 6), resume=saved, full=full)
    torch.save(results, folder / f"rank{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
