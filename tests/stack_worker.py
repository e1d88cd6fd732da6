"""One of two processes: two Llamas under DDP, FSDP1 and FSDP2, compiled and checkpointed, for `test_stacks.py`.

Started with torchrun's environment variables: `python -m tests.stack_worker FOLDER DEVICE PART...`; DEVICE is `cpu` or
`gpu`, PART a strategy, `graphs` or `others`.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn import functional as F
from torch.utils.data import DataLoader

from examples.llama import Llama, LlamaConfig
from lightning_int8 import FallbackInt8Precision
from tests import foreign_models
from tests.distributed_worker import CpuFSDPStrategy
from tests.tiny import GPU_RECIPE, trainer
from tests.two_processes import add_up_in_order

MODELS = ("ours", "llama")
# Of transformers and PyTorch.
OTHERS = ("qwen2", "mistral", "gpt2", "bert", "vit", "encoder")
STRATEGIES = ("ddp", "fsdp1", "fsdp2")
VARIANTS = ("eager", "checkpointed", "compiled")
# Compared with DDP's, not with plain DDP.
OTHER_RUNS = ("accumulated", "LoRA")
# Of FSDP2 alone: weights kept after the forward, the model made on the meta device, weights gathered in bfloat16.
FSDP2_VARIANTS = ("not resharded", "from meta", "gathered in bfloat16")
CELLS = [
    *itertools.product(MODELS, STRATEGIES, VARIANTS),
    *itertools.product(["ours"], STRATEGIES, ["compiled and checkpointed"]),
    *itertools.product(["ours"], ["fsdp2"], FSDP2_VARIANTS),
    *itertools.product(["ours"], STRATEGIES, ["accumulated"]),
    # Lightning neither averages sharded weights nor takes a compiled LightningModule under FSDP2.
    ("ours", "ddp", "averaged"),
    *itertools.product(["ours"], ["ddp", "fsdp1"], ["whole module compiled"]),
]
OTHER_CELLS = [
    *itertools.product(OTHERS, STRATEGIES, ["eager"]),
    *itertools.product(["ours"], STRATEGIES, ["LoRA"]),
    *itertools.product(OTHERS[:-1], ["ddp"], ["compiled and checkpointed"]),
    ("encoder", "ddp", "compiled"),
]
PARTS = {"graphs": [("ours", "ddp", "eager"), ("ours", "ddp", "graphs")], "others": OTHER_CELLS}
STEPS, BATCH, LENGTH, VOCABULARY = 3, 4, 32, 128


def ours(checkpointed: bool) -> nn.Module:
    return Llama(
        LlamaConfig(
            vocab_size=VOCABULARY, dim=64, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=96, max_seq_len=LENGTH,
            activation_checkpointing=checkpointed,
        )
    )  # fmt: skip


class Other(nn.Module):
    """One of `foreign_models.py`, from token ids to logits of the last tokens."""

    def __init__(self, name: str, checkpointed: bool) -> None:
        super().__init__()
        self.name = name
        self.model = getattr(foreign_models, name)()
        if name == "encoder":
            self.embedding, self.head = nn.Embedding(VOCABULARY, 64), nn.Linear(64, VOCABULARY)
            return
        # Each layer would compile anew for its place in the cache.
        self.model.config.use_cache = False
        if checkpointed:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})

    def forward(self, tokens: Tensor) -> Tensor:
        if self.name == "encoder":
            return self.head(self.model(self.embedding(tokens)))
        if self.name == "vit":
            # An image of the ids; its class stands for the last token.
            pixels = (tokens / VOCABULARY).repeat(1, 3 * 16 * 16 // LENGTH).view(-1, 3, 16, 16)
            return self.model(pixel_values=pixels).logits[:, None]
        return self.model(input_ids=tokens).logits


class Module(pl.LightningModule):
    def __init__(self, model: str, variant: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.variant = variant
        checkpointed = "checkpointed" in variant
        self.model = ours(checkpointed) if model == "ours" else Other(model, checkpointed)
        if variant == "LoRA":
            import peft

            self.model = peft.get_peft_model(self.model, peft.LoraConfig(target_modules="all-linear"))
        # Each of these models has one list, of its two layers.
        (self.layers,) = (list(m) for m in self.model.modules() if isinstance(m, nn.ModuleList))
        if "compiled" in variant and "whole" not in variant:
            # PyTorch compiles its own encoder's layers inside of another module only.
            for module in [self.model] if model == "encoder" else self.layers:
                module.compile(backend="aot_eager")
        if variant == "graphs":
            for layer in self.layers:
                layer.compile(mode="reduce-overhead")
        self.losses: list[float] = []
        self.graphs: list[int] = []

    def on_train_batch_start(self, *_: Any) -> None:
        torch.compiler.cudagraph_mark_step_begin()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        logits = self.model(batch[:, :-1]).float()
        return F.cross_entropy(logits.flatten(0, 1), batch[:, -logits.shape[1] :].flatten() % logits.shape[2])

    def on_train_batch_end(self, outputs: dict[str, Tensor], *_: Any) -> None:
        self.losses.append(outputs["loss"].item())
        self.graphs.append(counters["stats"]["unique_graphs"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)

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
    precision = "bf16-mixed" if "bfloat16" in variant else "32-true"
    plugin = FallbackInt8Precision(GPU_RECIPE, precision, ["lora_A", "lora_B"] if variant == "LoRA" else None)
    options = {"accelerator": device, "devices": 2, "strategy": strategies[strategy]()}
    options |= {"accumulate_grad_batches": 2} if variant == "accumulated" else {}
    options |= {"callbacks": [EMAWeightAveraging()]} if variant == "averaged" else {}
    fitted = torch.compile(module, backend="aot_eager") if "whole" in variant else module
    trainer(folder, plugin=plugin, **options).fit(fitted)
    return {"losses": module.losses, "graphs": module.graphs}


def main() -> None:
    folder, device, parts = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    torch.set_num_threads(1)
    add_up_in_order(device)
    cells = [cell for part in parts for cell in PARTS.get(part) or [c for c in CELLS if c[1] == part]]
    results = {", ".join(cell): run(folder, device, *cell) for cell in cells}
    torch.save(results, folder / f"rank{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
