"""One of two processes: two Llamas under DDP, FSDP1 and FSDP2, compiled and checkpointed, for `test_stacks.py`.

Started with torchrun's environment variables: `python -m tests.stack_worker FOLDER DEVICE`; DEVICE is `cpu` or `gpu`.
"""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn import functional as F
from torch.utils.data import DataLoader

from examples.llama import Llama, LlamaConfig
from lightning_int8 import FallbackInt8Precision
from tests.distributed_worker import CpuFSDPStrategy
from tests.tiny import GPU_RECIPE, trainer

os.environ.setdefault("HF_HUB_OFFLINE", "1")

MODELS = ("ours", "transformers")
STRATEGIES = ("ddp", "fsdp1", "fsdp2")
VARIANTS = ("eager", "checkpointed", "compiled")
# Compiling takes most of the time: for the CPU, and into CUDA graphs.
CELLS = {
    "cpu": [
        *itertools.product(MODELS, STRATEGIES, VARIANTS),
        *itertools.product(["ours"], STRATEGIES, ["compiled and checkpointed"]),
    ],
    "gpu": [*itertools.product(["ours"], STRATEGIES, VARIANTS), ("ours", "ddp", "graphs")],
}
STEPS, BATCH, LENGTH, VOCABULARY = 3, 4, 32, 128


def ours(checkpointed: bool) -> nn.Module:
    return Llama(
        LlamaConfig(
            vocab_size=VOCABULARY, dim=64, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=96, max_seq_len=LENGTH,
            activation_checkpointing=checkpointed,
        )
    )  # fmt: skip


def transformers(checkpointed: bool) -> nn.Module:
    import transformers

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**sizes, vocab_size=VOCABULARY, num_key_value_heads=2, use_cache=False)
    model = transformers.LlamaForCausalLM(config)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


class Module(pl.LightningModule):
    def __init__(self, model: str, variant: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.model = {"ours": ours, "transformers": transformers}[model]("checkpointed" in variant)
        self.layers = list(self.model.layers if model == "ours" else self.model.model.layers)
        if "compiled" in variant:
            for layer in self.layers:
                layer.compile(backend="aot_eager")
        if variant == "graphs":
            for layer in self.layers:
                layer.compile(mode="reduce-overhead")
        self.losses: list[float] = []
        self.graphs: list[int] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        logits = self.model(batch[:, :-1])
        logits = logits if isinstance(logits, Tensor) else logits.logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
        self.losses.append(loss.item())
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        self.graphs.append(counters["stats"]["unique_graphs"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def train_dataloader(self) -> DataLoader:
        generator = torch.Generator().manual_seed(0)
        return DataLoader(torch.randint(VOCABULARY, (2 * STEPS * BATCH, LENGTH + 1), generator=generator), BATCH)


class ShardedModule(Module):
    def configure_model(self) -> None:
        if not isinstance(self.model, FSDPModule):
            mesh = self.device_mesh["data_parallel"]
            for layer in self.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(self.model, mesh=mesh)


def run(folder: Path, device: str, model: str, strategy: str, variant: str) -> dict[str, Any]:
    torch._dynamo.reset()
    counters.clear()
    module = (ShardedModule if strategy == "fsdp2" else Module)(model, variant)
    fsdp1 = CpuFSDPStrategy if device == "cpu" else FSDPStrategy
    strategies = {
        "ddp": lambda: DDPStrategy(),
        "fsdp1": lambda: fsdp1(auto_wrap_policy={type(module.layers[0])}),
        "fsdp2": lambda: ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
    }
    plugin = FallbackInt8Precision(GPU_RECIPE, "32-true")
    options = {"accelerator": device, "devices": 2, "strategy": strategies[strategy]()}
    trainer(folder, plugin=plugin, **options).fit(module)
    return {"losses": module.losses, "graphs": module.graphs}


def main() -> None:
    folder, device = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    results = {", ".join(cell): run(folder, device, *cell) for cell in CELLS[device]}
    torch.save(results, folder / f"rank{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
