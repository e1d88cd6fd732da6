"""`lightning-int8-bench`: what INT8 gains on this GPU, for the linears of Llamas or for the models of ``--config``.

    lightning-int8-bench --config config.yaml
    lightning-int8-bench --config path/to/transformers/model --seconds 300 --recipes row

Compiles side by side, then measures GEMMs, linear layers (forward and backward with all quantization) and, given a
model, its training step and the first step of a fresh process, each beside BF16 and, where torchao is installed, its
FP8. Prints tables and advice, and writes them with a plot and the raw numbers as it goes.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import platform
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TimeElapsedColumn

from lightning_int8.arguments import positive
from lightning_int8.bench.precisions import TORCHAO
from lightning_int8.bench.report import added, tables, write
from lightning_int8.bench.run import Run
from lightning_int8.bench.step import COMPILING
from lightning_int8.kernels.compile_ahead import default_workers
from lightning_int8.recipe import PRESETS, Int8Recipe, resolve_recipe
from lightning_int8.small_layers import MinFeatures, check_min_features

# Each section's share of the time, among those that are run; what one leaves is the next one's.
SECTIONS = {"gemm": 0.2, "linear": 0.2, "step": 0.6}
# After all models', in what time is left.
FIRST_STEP = "first-step"


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    made = argparse.ArgumentParser(
        "lightning-int8-bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument(
        "--config", nargs="+", default=[],
        help="models, each a LightningCLI YAML, a folder with a transformers config.json, or package.module:function "
        "of a function that makes a causal language model; without one no training step is timed",
    )  # fmt: skip
    made.add_argument(
        "--recipes", nargs="+", type=recipe, metavar="RECIPE",
        help=f"of {', '.join(PRESETS)}, or fields as JSON, such as "
        '\'{"preset": "row", "fuse_swiglu": true}\'; default: the config\'s own, or row block',
    )  # fmt: skip
    made.add_argument("--peers", nargs="*", choices=TORCHAO, help="torchao's; default: its FP8 where it is installed")
    made.add_argument(
        "--min-features", type=min_features, help="'auto' or a number, for the step; default: the config's, or 0"
    )
    made.add_argument(
        "--tokens", type=positive, default=16384, help="tokens a step (a YAML's data decide for themselves)"
    )
    made.add_argument("--shapes", nargs="+", type=shape, metavar="K,N", help="linears to time, as in,out features")
    made.add_argument("--sections", nargs="+", choices=[*SECTIONS, FIRST_STEP], default=[*SECTIONS, FIRST_STEP])
    made.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: to try the command out, no more")
    made.add_argument(
        "--compile", choices=list(COMPILING), default="graphs",
        help="of the step: layer by layer and replayed as CUDA graphs (default), layer by layer, or not",
    )  # fmt: skip
    made.add_argument(
        "--compile-workers", type=int,
        help="processes that compile side by side before anything is timed; 0: none. Default: one a CPU core and 4 GiB "
        "of the GPU's memory, at most 24; none with --device cpu",
    )  # fmt: skip
    made.add_argument(
        "--seconds", type=float, default=180.0,
        help="what would end later is left out, and named; compiling ahead may take 45 %% of it",
    )  # fmt: skip
    made.add_argument(
        "--output", type=Path, default=Path("bench"), help="folder for <date>-<gpu>-bench.json, .md, .png"
    )
    made.add_argument("--add", action="store_true", help="keep what those files already hold")
    return made


def recipe(text: str) -> Int8Recipe:
    """A preset by its name, or a recipe from its fields as JSON."""
    try:
        return resolve_recipe(json.loads(text) if text.startswith("{") else text)
    except (ValueError, TypeError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def min_features(text: str) -> MinFeatures:
    """``auto`` or a number."""
    try:
        return check_min_features("auto" if text == "auto" else int(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def shape(text: str) -> tuple[int, int]:
    """In-features and out-features, as ``4096,14336``."""
    k, n = map(int, text.split(","))
    return k, n


def last_begin(sections: Sequence[str], models: int) -> list[dict[str, float]]:
    """For each model, the fraction of all time by which each of these sections begins its last measurement."""
    chosen = [section for section in SECTIONS if section in sections]
    sums = list(itertools.accumulate(SECTIONS[section] for section in chosen))
    parts = {section: part / sums[-1] for section, part in zip(chosen, sums, strict=True)}
    return [{section: (model + part) / models for section, part in parts.items()} for model in range(models)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; ``arguments`` are the process's when ``None``. Returns the exit status."""
    made = parser()
    args = made.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        made.error(
            "no CUDA GPU is visible, and this measures one: run it on a machine with an NVIDIA GPU and a PyTorch built "
            f"for it (this one is {torch.__version__}; torch.cuda.is_available() is false)."
        )
    if args.compile_workers is None:
        args.compile_workers = default_workers() if args.device == "cuda" else 0
    gpu = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU ({platform.machine()}), not a GPU"
    console = Console()
    file = args.output / default_name(gpu)
    known = file.with_name(file.name + ".json")
    old = json.loads(known.read_text()) if args.add and known.exists() else None
    command = "lightning-int8-bench " + shlex.join(sys.argv[1:] if arguments is None else arguments)

    def finished(results: Mapping[str, Any]) -> dict[str, Any]:
        """With the command, and what the files already held."""
        new = {**results, "about": {**results["about"], "command": command}}
        return new if old is None else added(old, new)

    configs = args.config or [None]
    with Progress(SpinnerColumn(), *Progress.get_default_columns()[:2], TimeElapsedColumn(), console=console) as bar:
        # What was measured survives whatever ends the rest.
        run = Run(args, gpu, bar, lambda results: write(finished(results), file))
        run.compile_ahead(configs, args.sections)
        for config, until in zip(configs, last_begin(args.sections, len(configs)), strict=True):
            run.measure(config, until)
        for config in args.config if FIRST_STEP in args.sections else ():
            run.first_step(config, 1.0)
    results = finished(run.results())
    for table in tables(results):
        console.print(table.rich())
    for line in results["advice"]:
        console.print(f"• {line}", highlight=False)
    for line in results["skipped"]:
        console.print(f"Not measured: {line}", highlight=False)
    written = write(results, file)
    console.print("Wrote " + ", ".join(map(str, written)), highlight=False)
    return 0


def default_name(gpu: str) -> str:
    """``<date>-<gpu>-bench``."""
    short = re.sub(r"[^A-Za-z0-9]+", "-", gpu.removeprefix("NVIDIA ").split(" ")[0])
    return f"{datetime.date.today().isoformat()}-{short}-bench"
