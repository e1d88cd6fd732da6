"""One of two gloo processes: runs every distributed scenario and saves what each left on this rank.

Started by `test_distributed.py` with torchrun's environment variables: `python -m tests.distributed_worker FOLDER`.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from lightning_int8 import (
    FallbackInt8Precision,
    FallbackRateMonitor,
    convert_to_int8,
    fallback_states,
    update_thresholds,
)
from lightning_int8.plugin_core import _is_fsdp1, clip_grad_norm
from tests.tiny import BATCH, RECIPE, Block, TinyModel, TinyModule, batches, thresholds, trainer

CLIP = 0.1


class Sharded(TinyModule):
    """FSDP2: every linear, every block and the root are sharded before the plugin sees them."""

    def configure_model(self) -> None:
        if isinstance(self.model.lm_head, nn.Linear) and not hasattr(self.model, "unshard"):
            mesh = self.device_mesh["data_parallel"]
            # Inner modules first.
            for module in reversed([m for m in self.model.modules() if isinstance(m, (nn.Linear, Block))]):
                fully_shard(module, mesh=mesh)
            fully_shard(self.model, mesh=mesh)


def fit(
    folder: Path, model: TinyModule, strategy: Any, precision: Any = "32-true", **kwargs: Any
) -> tuple[pl.Trainer, FallbackInt8Precision]:
    plugin = FallbackInt8Precision(RECIPE, precision=precision)
    run = trainer(folder, plugin=plugin, strategy=strategy, devices=2, **kwargs)
    run.fit(model)
    return run, plugin


def ddp(folder: Path) -> dict[str, Any]:
    model = TinyModule(steps=6)
    monitor = FallbackRateMonitor(every_n_steps=2)
    run, plugin = fit(
        folder, model, DDPStrategy(process_group_backend="gloo"), callbacks=[monitor], gradient_clip_val=CLIP
    )
    run.save_checkpoint(folder / "ddp.ckpt")
    state = plugin.state_dict()["thresholds"]
    # A layer that has not run on one rank takes the other's threshold, and the ranks' reductions still match.
    if run.global_rank == 1:
        fallback_states(model)["model.lm_head"].load_state_dict({})
    update_thresholds(model)
    return {
        "thresholds": state,
        "after_loss_on_one_rank": {name: table[:, 0] for name, table in thresholds(model).items()},
        "losses": model.losses,
        "weights": {n: p.detach() for n, p in model.named_parameters()},
        "rates": monitor.rates,
    }


def fsdp2(folder: Path) -> dict[str, Any]:
    model = Sharded(steps=6)
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False)
    run, plugin = fit(folder, model, strategy, gradient_clip_val=CLIP)
    classes = {name: [c.__name__ for c in type(m).__mro__][:4] for name, m in model.model.named_modules()}
    run.save_checkpoint(folder / "fsdp2.ckpt")
    run.validate(model, verbose=False)
    return {
        "thresholds": plugin.state_dict()["thresholds"],
        "losses": model.losses,
        "classes": classes,
        "weights": {n: p.full_tensor().detach() for n, p in model.named_parameters()},
    }


class CpuFSDPStrategy(FSDPStrategy):
    """FSDP1, which Lightning offers on accelerators only, on the CPU."""

    def _setup_model(self, model: nn.Module) -> nn.Module:
        device = torch.device("cpu")
        return FullyShardedDataParallel(
            model, mixed_precision=self.mixed_precision_config, device_id=device, **self.kwargs
        )


def fsdp1(folder: Path, precision: str = "32-true") -> dict[str, Any]:
    model = TinyModule(steps=6)
    strategy = CpuFSDPStrategy(auto_wrap_policy={Block}, process_group_backend="gloo", state_dict_type="full")
    run, plugin = fit(folder, model, strategy, precision, gradient_clip_val=CLIP)
    assert isinstance(run.strategy.model, FullyShardedDataParallel)
    return {"thresholds": plugin.state_dict()["thresholds"], "losses": model.losses}


def fsdp1_bf16(folder: Path) -> dict[str, Any]:
    return fsdp1(folder, "bf16-mixed")


def plain_fsdp1(folder: Path) -> dict[str, Any]:
    torch.manual_seed(1)
    model = TinyModel()
    convert_to_int8(model, RECIPE)
    policy = ModuleWrapPolicy({Block})
    root = FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu"))
    x, _ = batches(2)
    for _ in range(2):
        rows = x[dist.get_rank() * BATCH :][:BATCH]
        root(rows).square().mean().backward()
        update_thresholds(root)
    return {"thresholds": thresholds(root), "is_fsdp1": _is_fsdp1([model])}


def budget(folder: Path) -> dict[str, Any]:
    """Ranks with other batches, whose mean squares must be reduced with the counts."""
    torch.manual_seed(1)
    model = TinyModel()
    convert_to_int8(model, dataclasses.replace(RECIPE, budget=0.1, activation_band=(0, 0.4), gradient_band=(0, 0.4)))
    x, _ = batches(2)
    for _ in range(4):
        model(x[dist.get_rank() * BATCH :][:BATCH].exp()).square().mean().backward()
        update_thresholds(model)
    return {"thresholds": thresholds(model)}


def clipping(folder: Path) -> dict[str, Any]:
    torch.manual_seed(1)
    plain, sharded = TinyModel(), TinyModel()
    sharded.load_state_dict(plain.state_dict())
    # The root's own parameters stay plain tensors beside DTensors.
    for layer in sharded.layers:
        fully_shard(layer)
    x, _ = batches(1)
    results: dict[str, Any] = {}
    for name, model in (("plain", plain), ("sharded", sharded)):
        model(x).square().mean().backward()
        total = clip_grad_norm(model.parameters(), 0.01)
        grads = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in model.parameters()]
        results[name] = {"total": total, "grads": grads}
    return results


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for scenario in (ddp, fsdp2, fsdp1, fsdp1_bf16, plain_fsdp1, budget, clipping):
        results[scenario.__name__] = scenario(folder / scenario.__name__)
        dist.barrier()
    torch.save(results, folder / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
