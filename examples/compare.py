"""Trains one config twice, in full precision and through the INT8 plugin, on the same seed and batches, and compares.

    python -m examples.compare --recipe row

Everything lands in `runs/<time>-<recipe>/`; `runs/latest` points there once the run is complete.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
import time
import uuid
import warnings
from pathlib import Path
from typing import Any, get_args

import lightning as L
import torch
import yaml
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console

from examples.data import TextDataModule
from examples.model import LlamaModule
from examples.plan import CONFIGS, MAX_DEFAULT_STEPS, Plan
from examples.recorder import Curve, Recorder
from examples.report import print_table, write_curves, write_metrics, write_summary
from lightning_int8 import PRESETS, FallbackInt8Precision, FallbackRateMonitor
from lightning_int8.arguments import positive
from lightning_int8.plugin_core import OuterPrecision

FULL_PRECISION, INT8 = "full_precision", "int8"


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.compare", description=__doc__.split("\n")[0])
    parser.add_argument("--recipe", choices=list(PRESETS), help="preset of the INT8 run; default: the config's recipe")
    parser.add_argument("--config", type=Path, help="YAML config; default: tiny.yaml, with a GPU 125m.yaml")
    parser.add_argument(
        "--steps", type=positive, help=f"optimizer steps; default: the config's, at most {MAX_DEFAULT_STEPS}"
    )
    parser.add_argument("--batch-size", type=positive, help="sequences in a batch; default: the config's")
    parser.add_argument(
        "--val-batches", type=positive, help="held-out batches an evaluation takes; default: the config's"
    )
    parser.add_argument(
        "--precision",
        choices=get_args(OuterPrecision),
        help="precision of both runs; default: the config's, on a CPU 32-true",
    )
    parser.add_argument("--text", help="text file or folder; default: the config's (Python's standard library)")
    parser.add_argument("--cache-dir", help="where tokenizer and tokens are kept; default: the config's")
    parser.add_argument("--seed", type=int, help="seed of weights and batches; default: the config's")
    parser.add_argument("--accelerator", choices=["auto", "cpu", "gpu"], help="default: the config's")
    parser.add_argument("--output", type=Path, default=Path("runs"), help="folder of the runs (%(default)s)")
    arguments = parser.parse_args(argv)
    on_gpu = arguments.accelerator != "cpu" and torch.cuda.is_available()
    arguments.config = arguments.config or CONFIGS / ("125m.yaml" if on_gpu else "tiny.yaml")
    if not arguments.config.is_file():
        parser.error(
            f"--config={arguments.config} does not exist; ours are {', '.join(map(str, CONFIGS.glob('*.yaml')))}."
        )
    arguments.command = shlex.join(["python", "-m", "examples.compare", *(sys.argv[1:] if argv is None else argv)])
    try:
        arguments.plan = Plan.of(arguments)
    except (OSError, TypeError, ValueError, yaml.YAMLError) as error:
        parser.error(f"--config={arguments.config}: {' '.join(str(error).split())}")
    return arguments


def train(name: str, plan: Plan, folder: Path) -> tuple[Curve, LlamaModule, TextDataModule]:
    """One run, in full precision or in INT8."""
    L.seed_everything(plan.seed, verbose=False)
    (module, data), recorder = plan.make(), Recorder()
    monitor: FallbackRateMonitor | None = None
    callbacks: list[Callback] = [
        recorder,
        RichProgressBar(refresh_rate=5),
        ModelCheckpoint(
            dirpath=folder / name / "checkpoints",
            filename="last",
            every_n_train_steps=max(1, plan.steps // 3),
            enable_version_counter=False,
        ),
    ]
    if name == FULL_PRECISION:
        precision: dict[str, Any] = {"precision": plan.precision}
    else:
        plugin = FallbackInt8Precision(**plan.plugin)
        precision = {"plugins": plugin}
        if plugin.recipe.falls_back:
            monitor = FallbackRateMonitor(every_n_steps=max(1, plan.steps // 60), dirpath=str(folder))
            callbacks.append(monitor)
    trainer = L.Trainer(
        accelerator=plan.accelerator,
        devices=1,
        max_steps=plan.steps,
        # In batches, not in optimizer steps.
        val_check_interval=-(-plan.steps // 3) * plan.trainer.get("accumulate_grad_batches", 1),
        check_val_every_n_epoch=None,
        limit_val_batches=plan.val_batches,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        logger=CSVLogger(folder, name=name, version=""),
        callbacks=callbacks,
        enable_model_summary=False,
        **precision,
        **plan.trainer,
    )
    trainer.fit(module, datamodule=data)
    if plan.steps not in recorder.curve.val_loss:
        trainer.validate(module, datamodule=data, verbose=False)
    if monitor is not None:
        rates = monitor.rates.nanmean(1).tolist()
        recorder.curve.fallback_rate = dict(zip(monitor.steps, rates, strict=True))
    return recorder.curve, module, data


def sample_text(module: LlamaModule, data: TextDataModule, seed: int, prompt: str = "def", length: int = 96) -> str:
    """A prompt continued by the model."""
    device = module.device
    tokens = torch.tensor([data.tokenizer.encode(prompt).ids], device=device)
    generator = torch.Generator(device).manual_seed(seed)
    return data.tokenizer.decode(module.generate(tokens, length, generator=generator)[0].tolist())


def point_latest(output: Path, run: Path) -> None:
    """Makes ``output/latest`` a link to ``run`` in one step, so that it points at a complete run at every moment."""
    link = output / f".latest-{uuid.uuid4().hex}"
    link.symlink_to(run.name, target_is_directory=True)
    os.replace(link, output / "latest")


def main(argv: list[str] | None = None) -> Path:
    """Runs the comparison and returns its folder."""
    arguments = parse_arguments(argv)
    plan = arguments.plan
    console = Console()
    for noisy in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated.*")

    started = time.time()
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{plan.recipe}"
    folder = arguments.output / name
    while folder.exists():
        folder = arguments.output / f"{name}-{uuid.uuid4().hex[:4]}"
    folder.mkdir(parents=True)
    console.print(
        f"[bold]{arguments.config.stem}[/], {plan.steps} steps, precision {plan.precision}, {plan.accelerator}"
    )
    with console.status("Reading the text, training the tokenizer (cached after the first time) …"):
        TextDataModule(**plan.data).prepare_data()

    console.print("[bold]1/2[/] full precision")
    full, _, _ = train(FULL_PRECISION, plan, folder)
    console.print(f"[bold]2/2[/] INT8, recipe {plan.recipe}")
    int8, module, data = train(INT8, plan, folder)

    curves = {FULL_PRECISION: full, INT8: int8}
    text = sample_text(module, data, plan.seed)
    (folder / "sample.txt").write_text(text + "\n")
    write_metrics(folder / "metrics.csv", curves)
    write_curves(folder / "curves.png", curves, plan.recipe)
    seconds = time.time() - started
    summary = write_summary(folder / "summary.json", curves, plan, arguments, seconds)
    point_latest(arguments.output, folder)

    console.rule("sample of the INT8 model")
    console.print(text, markup=False, highlight=False)
    print_table(console, summary)
    console.print(f"{folder} ({seconds:.0f} s), also {arguments.output / 'latest'}:")
    console.print("  " + "  ".join(sorted(path.name for path in folder.iterdir())), highlight=False)
    return folder


if __name__ == "__main__":
    main()
