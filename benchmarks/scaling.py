"""Scaling efficiency from one GPU to several, INT8 and BF16 in the same run: the same tokens a GPU, AdamW.

`torchrun --nproc-per-node 2 -m benchmarks.scaling --model 1b --json scaling.json`

Every rank first trains by itself, all at the same time, then with the others. Efficiency is the former's median time
of a step over the latter's.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from benchmarks.train_step import MODELS, next_token_loss
from examples.llama import Llama, LlamaConfig
from lightning_int8 import convert_to_int8
from lightning_int8.bench.step import make_step
from lightning_int8.bench.timing import seconds

# Strategies, and torch.compile's mode for each layer under them. FSDP2 gathers weights wherever there is room, where a
# CUDA graph would not find them.
MODES = {"ddp": "reduce-overhead", "fsdp2": "default"}


def wrap(model: nn.Module, strategy: str) -> nn.Module:
    if strategy == "ddp":
        return DistributedDataParallel(model, gradient_as_bucket_view=True)
    if strategy == "fsdp2":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for layer in model.layers:
            fully_shard(layer, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
    return model


def measure(
    config: LlamaConfig,
    recipe: str | None,
    strategy: str,
    mode: str | None,
    tokens: int,
    steps: int,
    alone: dist.ProcessGroup,
) -> dict[str, Any]:
    """Median milliseconds of a step and peak GiB, the larger of all ranks."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    torch.manual_seed(0)
    with device:
        model = Llama(config)
    if recipe is not None:
        convert_to_int8(model, recipe, ignore_modules=["lm_head"])
    for layer in model.layers if mode else ():
        layer.compile(mode=mode)
    forward = wrap(model, strategy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    torch.manual_seed(dist.get_rank())
    ids = torch.randint(config.vocab_size, (tokens // config.max_seq_len, config.max_seq_len + 1), device=device)
    group = alone if strategy == "one" else None
    step = make_step(partial(next_token_loss, forward, ids), model, optimizer, group)
    times = [1e3 * seconds(step, device) for _ in range(3 + steps)][3:]
    peak = torch.cuda.max_memory_reserved() / 2**30 if device.type == "cuda" else 0.0
    worst = torch.tensor([statistics.median(times), peak], device=device)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    del model, forward, optimizer, step
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return {
        "precision": recipe or "bf16",
        "strategy": strategy,
        "mode": mode or "eager",
        "ms": worst[0].item(),
        "peak_gib": worst[1].item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), default="1b")
    parser.add_argument("--recipe", default="row")
    parser.add_argument("--strategies", nargs="+", choices=sorted(MODES), default=list(MODES))
    parser.add_argument("--tokens", type=int, default=16384, help="tokens a step and GPU")
    parser.add_argument("--steps", type=int, default=8, help="timed steps, after 3 of warm-up")
    parser.add_argument("--json", type=Path, help="where to write the results")
    arguments = parser.parse_args()
    dist.init_process_group()
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
    # Layers compile one by one, so that their gradients are there one by one; more cuts would only cost.
    torch._dynamo.config.optimize_ddp = False
    alone = [dist.new_group([other]) for other in range(ranks)][rank]
    results: list[dict[str, Any]] = []
    for strategy in arguments.strategies:
        mode = MODES[strategy]
        for recipe in (None, arguments.recipe):
            one, several = (
                measure(MODELS[arguments.model], recipe, kind, mode, arguments.tokens, arguments.steps, alone)
                for kind in ("one", strategy)
            )
            several["efficiency"] = one["ms"] / several["ms"]
            results += [one, several]
            if rank == 0:
                print(one, several, sep="\n", flush=True)
    if rank == 0:
        show(results, ranks, arguments)
    dist.destroy_process_group()


def show(results: list[dict[str, Any]], ranks: int, arguments: argparse.Namespace) -> None:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    table = Table(title=f"{arguments.model}, {arguments.tokens} tokens a GPU, {gpu}")
    for column in ("precision", "strategy", "GPUs", "ms a step", "efficiency", "speed-up over BF16", "peak GiB"):
        table.add_column(column, justify="right")
    bf16 = {(r["strategy"], r["mode"]): r["ms"] for r in results if r["precision"] == "bf16"}
    for r in results:
        table.add_row(
            r["precision"],
            f"{r['strategy']}, {r['mode']}",
            "1" if r["strategy"] == "one" else str(ranks),
            f"{r['ms']:.1f}",
            f"{r['efficiency']:.3f}" if "efficiency" in r else "",
            f"{bf16[r['strategy'], r['mode']] / r['ms']:.2f}×",
            f"{r['peak_gib']:.1f}",
        )
    Console(width=120).print(table)
    if arguments.json:
        header = {
            "device": gpu,
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "arguments": {k: str(v) for k, v in vars(arguments).items()},
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({**header, "results": results}, indent=1))


if __name__ == "__main__":
    main()
