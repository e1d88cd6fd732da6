"""INT8 training with Lightning Fabric, resumable at any step.

python -m examples.fabric_train --steps 20
python -m examples.fabric_train --steps 40 --checkpoint runs/fabric.ckpt
python -m examples.fabric_train --strategy fsdp2 --devices 2
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from lightning.fabric.strategies import FSDPStrategy, ModelParallelStrategy

from examples.data import TextDataModule
from examples.llama import DecoderLayer, Llama, LlamaConfig
from examples.model import parallelize, parameter_groups
from lightning_int8 import FabricFallbackInt8Precision
from lightning_int8.arguments import positive


def main(argv: list[str] | None = None) -> list[float]:
    """Trains and returns the loss of every step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="row")
    parser.add_argument("--precision", default="bf16-mixed" if torch.cuda.is_available() else "32-true")
    parser.add_argument("--steps", type=positive, default=20)
    parser.add_argument("--text", help="text file or folder; default: Python's standard library")
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--devices", type=positive, default=1)
    parser.add_argument("--strategy", choices=("auto", "ddp", "fsdp", "fsdp2"), default="auto")
    parser.add_argument("--checkpoint", type=Path, help="resumed from where it exists, written at the end")
    arguments = parser.parse_args(argv)

    plugin = FabricFallbackInt8Precision(arguments.recipe, arguments.precision, ignore_modules=["lm_head"])
    devices, strategy = arguments.devices, arguments.strategy
    if strategy == "fsdp":
        strategy = FSDPStrategy(auto_wrap_policy={DecoderLayer})
    elif strategy == "fsdp2":
        strategy = ModelParallelStrategy(parallelize, data_parallel_size=devices, tensor_parallel_size=1)
    fabric = L.Fabric(accelerator=arguments.accelerator, devices=devices, strategy=strategy, plugins=plugin)
    fabric.launch()
    fabric.seed_everything(0, verbose=False)

    data = TextDataModule(path=arguments.text, batch_size=8, vocab_size=1024)
    if fabric.local_rank == 0:
        data.prepare_data()
    fabric.barrier()
    data.setup()
    stream = data.train_dataloader(rank=fabric.global_rank, world_size=fabric.world_size)
    model = fabric.setup_module(Llama(LlamaConfig(vocab_size=1024, n_layers=2)))
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-3))

    if arguments.checkpoint and arguments.checkpoint.exists():
        extra = fabric.load(arguments.checkpoint, {"model": model, "optimizer": optimizer})
        stream.load_state_dict(extra["stream"])
        plugin.load_state_dict(extra["thresholds"])

    losses: list[float] = []
    while stream.batches_yielded < arguments.steps:
        batch = fabric.to_device(stream.batch(stream.batches_yielded))
        stream.batches_yielded += 1
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        fabric.print(f"step {stream.batches_yielded}: loss {losses[-1]:.4f}")
    if arguments.checkpoint:
        state = {"model": model, "optimizer": optimizer, "stream": stream.state_dict()}
        fabric.save(arguments.checkpoint, state | {"thresholds": plugin.state_dict()})
    return losses


if __name__ == "__main__":
    main()
