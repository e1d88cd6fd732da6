"""`lightning-int8-bench`: what INT8 gains on this GPU, for the linears of Llamas or for the model of ``--config``.

    lightning-int8-bench --config config.yaml
    lightning-int8-bench --config path/to/transformers/model --seconds 300 --peers fp8-rowwise fp8-tensorwise

Measures GEMMs, linear layers (forward and backward with all quantization) and, given a model, its training step and the
first step of a fresh process, each beside BF16 and, where torchao is installed, its FP8. Prints tables and advice, and
writes them with a plot and the raw numbers.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import platform
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TimeElapsedColumn

from lightning_int8.bench import first_step, gemm, linear, step
from lightning_int8.bench.advice import advice
from lightning_int8.bench.precisions import TORCHAO, installed_peers, precisions, versions
from lightning_int8.bench.report import tables, write
from lightning_int8.bench.roofline import peak_of
from lightning_int8.bench.timing import Clock, copy_bandwidth
from lightning_int8.bench.workload import load
from lightning_int8.kernels import backends
from lightning_int8.recipe import PRESETS

# In-features and out-features of the linears of a 1B and an 8B Llama, and smaller.
LINEARS = ((4096, 4096), (2048, 2048), (4096, 14336), (14336, 4096), (2048, 8192), (8192, 2048), (1024, 1024),
           (4096, 1024), (3072, 3072), (1536, 1536))  # fmt: skip
# Each section's share of the time, among those that are run; what one leaves is the next one's.
SECTIONS = {"gemm": 0.2, "linear": 0.3, "step": 0.35, "first-step": 0.15}


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    made = argparse.ArgumentParser(
        "lightning-int8-bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument(
        "--config",
        help="LightningCLI YAML, folder with a transformers config.json, or module:function of a function that makes a "
        "causal language model; without it no training step is timed",
    )
    made.add_argument("--recipes", nargs="+", choices=list(PRESETS), help="default: row block, or the config's own")
    made.add_argument("--peers", nargs="*", choices=TORCHAO, help="torchao's; default: its FP8 where it is installed")
    made.add_argument("--tokens", type=int, default=16384, help="tokens a step (a YAML's data decide for themselves)")
    made.add_argument("--shapes", nargs="+", type=shape, metavar="K,N", help="linears to time, as in,out features")
    made.add_argument("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    made.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: to try the command out, no more")
    made.add_argument("--eager", action="store_true", help="time the step without torch.compile")
    made.add_argument("--seconds", type=float, default=120.0, help="nothing new is begun past this")
    made.add_argument(
        "--output", type=Path, help="where to write .json, .md and .png; default: bench/<date>-<gpu> in this folder"
    )
    return made


def shape(text: str) -> tuple[int, int]:
    """In-features and out-features, as `4096,14336`."""
    k, n = map(int, text.split(","))
    return k, n


def last_begin(sections: Sequence[str]) -> dict[str, float]:
    """The fraction of the time by which each of these sections begins its last measurement."""
    chosen = [section for section in SECTIONS if section in sections]
    sums = list(itertools.accumulate(SECTIONS[section] for section in chosen))
    return {section: part / sums[-1] for section, part in zip(chosen, sums, strict=True)}


def default_output(folder: str, gpu: str) -> Path:
    """``folder/<date>-<gpu>-bench``."""
    short = re.sub(r"[^A-Za-z0-9]+", "-", gpu.removeprefix("NVIDIA ")).strip("-")
    return Path(folder) / f"{datetime.date.today().isoformat()}-{short}-bench"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; ``arguments`` are the process's when ``None``. Returns the exit status."""
    made = parser()
    args = made.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        made.error(
            "no CUDA GPU is visible, and this measures one: run it on a machine with an NVIDIA GPU and a PyTorch built "
            f"for it (this one is {torch.__version__}; torch.cuda.is_available() is false)."
        )
    gpu = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU ({platform.machine()}), not a GPU"
    console = Console()
    with Progress(SpinnerColumn(), *Progress.get_default_columns()[:2], TimeElapsedColumn(), console=console) as bar:
        results = _measure(args, gpu, bar)
    for table in tables(results):
        console.print(table.rich())
    for line in results["advice"]:
        console.print(f"• {line}", highlight=False)
    for line in results["skipped"]:
        console.print(f"Not measured: {line}", highlight=False)
    written = write(results, args.output or default_output("bench", gpu))
    console.print("Wrote " + ", ".join(map(str, written)), highlight=False)
    return 0


def _measure(args: argparse.Namespace, gpu: str, bar: Progress) -> dict[str, Any]:
    """Everything that is asked for and that there is time for."""
    clock = Clock(args.seconds)
    device = torch.device(args.device)
    workload = load(args.config, args.tokens, device) if args.config else None
    recipes = args.recipes or ([workload.recipe] if workload and workload.recipe else ["row", "block"])
    compared = precisions(recipes, installed_peers() if args.peers is None else args.peers)
    ours = [p for p in compared if p.recipe is not None]
    peak, bandwidth = peak_of(gpu), copy_bandwidth(device)
    names = dict(workload.shapes) if workload else {}
    shapes = args.shapes or list(names) or list(LINEARS)
    until = last_begin(args.sections)
    tokens = workload.tokens if workload else args.tokens
    results: dict[str, Any] = {"gemm": [], "linear": [], "step": [], "first_step": [], "advice": [], "skipped": []}
    if peak is None:
        results["skipped"].append(f"the modelled roofline: peak rates of {gpu} are not in the table")
    if "gemm" in args.sections:
        backend = backends.choose("auto", device)
        scalings = list(dict.fromkeys(p.recipe.scaling for p in ours if p.recipe and p.recipe.scaling != "vector"))
        peers = gemm.peers(device)
        lines = [(product, k, n) for k, n in shapes for product in ("forward", "dgrad", "wgrad")]
        task = bar.add_task("GEMMs", total=len(lines))
        for product, k, n in lines:
            if not clock.before(until["gemm"]):
                results["skipped"].append(f"GEMM {product} {k} → {n}: out of time (--seconds {args.seconds:g})")
                continue
            results["gemm"].append(
                gemm.measure(product, tokens, k, n, scalings, (0.0, 0.2), peers, backend, device, peak, bandwidth)
            )
            bar.advance(task)
    if "linear" in args.sections:
        task = bar.add_task("linear layers", total=len(shapes))
        for k, n in shapes:
            if not clock.before(until["linear"]):
                results["skipped"].append(f"linear {k} → {n}: out of time (--seconds {args.seconds:g})")
                continue
            results["linear"].append(linear.measure(tokens, k, n, compared, device, peak, bandwidth))
            bar.advance(task)
    results["advice"] = advice(results["linear"], [p.name for p in ours], names)
    if workload is None:
        results["skipped"].append("the training step and the first step: name a model with --config")
    elif "step" in args.sections:
        task = bar.add_task("training step", total=None)
        say = lambda text: bar.update(task, description=text)  # noqa: E731
        results["step"].append(step.measure(workload, compared, not args.eager, clock, until["step"], report=say))
        bar.update(task, total=1, completed=1, description="training step")
    if workload is not None and "first-step" in args.sections:
        if clock.before(until["first-step"]):
            task = bar.add_task("first step", total=None)
            recipe = ours[0].name if ours[0].name in PRESETS else "row"
            found = first_step.measure(
                args.config, recipe, tokens, device, lambda text: bar.update(task, description=text)
            )
            results["first_step"].append({"model": workload.name, "recipe": recipe, **found})
            bar.update(task, total=1, completed=1, description="first step")
        else:
            results["skipped"].append(f"the first step of a process: out of time (--seconds {args.seconds:g})")
    results["about"] = {
        "device": gpu, "date": datetime.date.today().isoformat(), "versions": versions(), "seconds": clock.spent,
        "copy_bandwidth": bandwidth, "command": "lightning-int8-bench " + shlex.join(sys.argv[1:]),
    }  # fmt: skip
    return results
