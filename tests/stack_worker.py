"""One of two processes: two Llamas under DDP, FSDP1 and FSDP2, compiled and checkpointed, for `test_stacks.py`.

Started with torchrun's environment variables: `python -m tests.stack_worker FOLDER DEVICE PART...`; DEVICE is `cpu` or
`gpu`, PART a strategy or `graphs`.
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
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn import functional as F
from torch.utils.data import DataLoader

from examples.llama import Llama, LlamaConfig
from lightning_int8 import FallbackInt8Precision
from tests.distributed_worker import CpuFSDPStrategy
from tests.tiny import GPU_RECIPE, trainer
from tests.two_processes import add_up_in_order

os.environ.setdefault("HF_HUB_OFFLINE", "1")

MODELS = ("ours", "transformers")
STRATEGIES = ("ddp", "fsdp1", "fsdp2")
VARIANTS = ("eager", "checkpointed", "compiled")
# Of FSDP2 alone: weights kept after the forward, the model made on the meta device, weights gathered in bfloat16.
FSDP2_VARIANTS = ("not resharded", "from meta", "gathered in bfloat16")
CELLS = [
    *itertools.product(MODELS, STRATEGIES, VARIANTS),
    *itertools.product(["ours"], STRATEGIES, ["compiled and checkpointed"]),
    *itertools.product(["ours"], ["fsdp2"], FSDP2_VARIANTS),
]
GRAPHS = [("ours", "ddp", "eager"), ("ours", "ddp", "graphs")]
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
        self.variant = variant
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
        if isinstance(self.model, FSDPModule):
            return
        if self.variant == "from meta":
            self.start = self.model.state_dict()
            self.model.to("meta")
        policy = MixedPrecisionPolicy(torch.bfloat16 if self.variant == "gathered in bfloat16" else None)
        for module in (*self.layers, self.model):
            fully_shard(
                module,
                mesh=self.device_mesh["data_parallel"],
                reshard_after_forward=self.variant != "not resharded",
                mp_policy=policy,
            )

    def on_fit_start(self) -> None:
        if self.variant == "from meta":
            # Lightning has given the shards memory and random values; a run would load a checkpoint here, too.
            options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
            set_model_state_dict(self.model, self.start, options=options)


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
    plugin = FallbackInt8Precision(GPU_RECIPE, "bf16-mixed" if "bfloat16" in variant else "32-true")
    options = {"accelerator": device, "devices": 2, "strategy": strategies[strategy]()}
    trainer(folder, plugin=plugin, **options).fit(module)
    return {"losses": module.losses, "graphs": module.graphs}


def main() -> None:
    folder, device, parts = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    torch.set_num_threads(1)
    add_up_in_order(device)
    cells = [cell for part in parts for cell in CELLS if cell[1] == part] + (GRAPHS if "graphs" in parts else [])
    results = {", ".join(cell): run(folder, device, *cell) for cell in cells}
    torch.save(results, folder / f"rank{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
