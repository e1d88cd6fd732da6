"""Times one training step, INT8 against BF16 in the same run: compiled by layer, AdamW fused, everything included.

`python -m benchmarks.train_step --model 1b --recipes row '{"recompute_swiglu": "all"}' --json docs/results/step.json`
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from examples.llama import Llama, LlamaConfig
from lightning_int8 import Int8Recipe, fallback_states
from lightning_int8.bench.cli import recipe
from lightning_int8.bench.precisions import TORCHAO, Precision, precisions, versions
from lightning_int8.bench.step import make_step
from lightning_int8.bench.timing import kernel_times
from lightning_int8.threshold import RATE

MODELS = {
    "125m": LlamaConfig(
        vocab_size=16384, dim=768, n_layers=14, n_heads=12, n_kv_heads=4, ffn_dim=2304, max_seq_len=1024
    ),
    "1b": LlamaConfig(
        vocab_size=32768, dim=2048, n_layers=16, n_heads=32, n_kv_heads=8, ffn_dim=8192, max_seq_len=2048
    ),
    "8b-6layers": LlamaConfig(
        vocab_size=32768, dim=4096, n_layers=6, n_heads=32, n_kv_heads=8, ffn_dim=14336, max_seq_len=2048
    ),
}


def next_token_loss(model: Callable[[Tensor], Tensor], ids: Tensor) -> Tensor:
    """Mean cross-entropy of each token after the ones before it, of ids ``[batch, length + 1]``."""
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def measure(
    config: LlamaConfig, precision: Precision, tokens: int, steps: int, compiling: str, mode: str, profile: bool
) -> dict:
    """Median milliseconds of a step, peak GiB and last loss, all but the head in ``precision``.

    ``compiling``: ``layers`` compiles one decoder layer and runs it for all, ``whole`` the model as one program, whose
    compile time grows with its depth, ``none`` neither. ``mode`` is `torch.compile`'s; ``reduce-overhead`` replays CUDA
    graphs.
    """
    torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = precision.convert(Llama(config), ["lm_head"])
    states = list(fallback_states(model).values())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    forward = torch.compile(model, mode=mode) if compiling == "whole" else model
    if compiling == "layers":
        for layer in model.layers:
            layer.compile(mode=mode)
    # New tokens each step: gradients of a batch that is known by heart are like no others.
    shape = 3 + steps, tokens // config.max_seq_len, config.max_seq_len + 1
    batches = itertools.cycle(torch.randint(config.vocab_size, shape, device="cuda").unbind())
    step = make_step(lambda: next_token_loss(forward, next(batches)), model, optimizer)
    step()
    torch.cuda.synchronize()
    first = time.perf_counter() - began
    for _ in range(2):
        step()
    torch.cuda.synchronize()
    times, rates = [], []
    for _ in track(range(steps), description=precision.name):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        loss = step()
        end.record()
        times.append((start, end))
        rates += [state.tensor[:, RATE] for state in states if state.tensor is not None]
    torch.cuda.synchronize()
    result = {
        "name": precision.name,
        "ms": statistics.median(start.elapsed_time(end) for start, end in times),
        # What CUDA graphs keep for their next replay is reserved, not allocated.
        "peak_gib": torch.cuda.max_memory_reserved() / 2**30,
        "first_step_s": first,
        "fallback_rate": float(torch.cat(rates).nanmean()) if rates else None,
        "loss": loss.item(),
    }
    if profile:
        result["kernels"] = dict(list(kernel_times(step, torch.device("cuda")).items())[:25])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=sorted(MODELS), default="1b")
    parser.add_argument(
        "--recipes", nargs="*", type=recipe, default=[Int8Recipe()], help="presets, or recipes' fields as JSON"
    )
    parser.add_argument("--peers", nargs="*", choices=TORCHAO, default=[], help="torchao's")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens a step")
    parser.add_argument("--steps", type=int, default=10, help="timed steps, after 3 of warm-up")
    parser.add_argument("--compile", choices=["layers", "whole", "none"], default="layers", help="torch.compile")
    parser.add_argument("--mode", choices=["default", "reduce-overhead"], default="reduce-overhead", help="of compile")
    parser.add_argument("--profile", action="store_true", help="list the kernels of a step")
    parser.add_argument("--json", type=Path, help="where to write the results")
    args = parser.parse_args()
    console = Console(width=140)
    header = {
        "device": torch.cuda.get_device_name(),
        "versions": {"python": platform.python_version(), **versions()},
        "arguments": {k: str(v) for k, v in vars(args).items()},
    }
    results = []
    for precision in precisions(args.recipes, args.peers):
        results.append(
            measure(MODELS[args.model], precision, args.tokens, args.steps, args.compile, args.mode, args.profile)
        )
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps({**header, "results": results}, indent=1))
    base = results[0]
    title = f"{args.model}, {args.tokens} tokens, compile={args.compile} ({args.mode}), {torch.cuda.get_device_name()}"
    table = Table(title=title)
    for column in ("precision", "ms a step", "speed-up", "peak GiB", "memory", "first step s", "fallback", "loss"):
        table.add_column(column, justify="right")
    for r in results:
        table.add_row(
            r["name"],
            f"{r['ms']:.1f}",
            f"{base['ms'] / r['ms']:.2f}×",
            f"{r['peak_gib']:.1f}",
            f"{r['peak_gib'] / base['peak_gib']:.2f}×",
            f"{r['first_step_s']:.1f}",
            "–" if r["fallback_rate"] is None else f"{r['fallback_rate']:.2f}",
            f"{r['loss']:.3f}",
        )
    console.print(table)
    for r in results:
        for kernel, ms in r.get("kernels", {}).items():
            console.print(f"{r['name']:>8} {ms:9.2f} ms  {kernel[:90]}", highlight=False)


if __name__ == "__main__":
    main()
