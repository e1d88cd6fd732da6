"""What a comparison leaves behind: metrics (CSV), curves (PNG), the summary (JSON) and the table of it."""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import json
import math
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from examples.recorder import Curve

if TYPE_CHECKING:
    from examples.plan import Plan

LABELS = {"full_precision": "full precision", "int8": "INT8"}


def write_metrics(file: Path, curves: dict[str, Curve]) -> None:
    """One row a step: training and held-out loss of each run, fallback rate."""
    series = {f"{name}_train_loss": curve.train_loss for name, curve in curves.items()}
    series |= {f"{name}_val_loss": curve.val_loss for name, curve in curves.items()}
    series |= {f"{name}_fallback_rate": curve.fallback_rate for name, curve in curves.items() if curve.fallback_rate}
    with open(file, "w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["step", *series])
        for step in sorted(set().union(*series.values())):
            writer.writerow([step, *(values.get(step, "") for values in series.values())])


def write_curves(file: Path, curves: dict[str, Curve], recipe: str) -> None:
    """Losses over steps, with the gap of the training losses below."""
    figure = Figure(figsize=(8, 6), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    for name, curve in curves.items():
        label = LABELS[name] + (f" ({recipe})" if name == "int8" else "")
        (line,) = upper.plot(list(curve.train_loss), list(curve.train_loss.values()), label=f"{label}, train", lw=1)
        upper.plot(
            list(curve.val_loss),
            list(curve.val_loss.values()),
            "o--",
            color=line.get_color(),
            label=f"{label}, held-out",
        )
    upper.set_ylabel("cross entropy (nats per token)")
    upper.legend()
    full, int8 = curves["full_precision"].train_loss, curves["int8"].train_loss
    common = [step for step in full if step in int8]
    lower.plot(common, [100 * (int8[s] - full[s]) / full[s] for s in common], lw=1, color="tab:red")
    lower.axhline(0, color="gray", lw=0.5)
    lower.set_ylabel("train gap (%)")
    lower.set_xlabel("step")
    figure.savefig(file, dpi=120)


def write_summary(
    file: Path, curves: dict[str, Curve], plan: Plan, arguments: argparse.Namespace, seconds: float
) -> dict[str, Any]:
    """Writes and returns the numbers of the table, and what it takes to repeat them."""
    full, int8 = curves["full_precision"], curves["int8"]
    on_gpu = plan.accelerator == "gpu"
    summary: dict[str, Any] = {
        name: {
            "train_loss": curve.final_train_loss,
            "val_loss": curve.final_val_loss,
            "tokens_per_second": curve.tokens_per_second,
        }
        for name, curve in curves.items()
    }
    summary |= {
        "gap_percent": 100 * (int8.final_val_loss - full.final_val_loss) / full.final_val_loss,
        "fallback_rate": int8.mean_fallback_rate,
        "recipe": plan.recipe,
        "plugin": plan.plugin,
        "config": arguments.config.name,
        "steps": plan.steps,
        "batch_size": plan.data.get("batch_size"),
        "sequence_length": plan.data.get("sequence_length"),
        "seed": plan.seed,
        "precision": plan.precision,
        "seconds": round(seconds, 1),
        "device": torch.cuda.get_device_name() if on_gpu else f"CPU, {os.cpu_count()} cores ({platform.machine()})",
        "versions": {"python": platform.python_version()}
        | {package: _version(package) for package in ("lightning-int8", "torch", "triton", "lightning")},
        "command": arguments.command,
    }
    file.write_text(json.dumps(_with_null_for_nan(summary), indent=2) + "\n")
    return summary


def _with_null_for_nan(value: Any) -> Any:
    """JSON has no NaN: the speed of a run without a measured step, or a loss that diverged."""
    if isinstance(value, dict):
        return {key: _with_null_for_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_table(console: Console, summary: dict[str, Any]) -> None:
    """Prints the two runs side by side."""
    table = Table(title=f"{summary['config']}, {summary['steps']} steps, {summary['device']}")
    # Narrow enough for a terminal of 80 columns.
    for column in ("", "train loss", "held-out", "gap", "fallback", "tokens/s"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for name in ("full_precision", "int8"):
        run, is_int8 = summary[name], name == "int8"
        rate = summary["fallback_rate"] if is_int8 else None
        table.add_row(
            LABELS[name] + (f" ({summary['recipe']})" if is_int8 else ""),
            f"{run['train_loss']:.4f}",
            f"{run['val_loss']:.4f}",
            f"{summary['gap_percent']:+.3f} %" if is_int8 else "",
            "–" if rate is None else f"{rate:.3f}",
            f"{run['tokens_per_second']:,.0f}",
        )
    console.print(table)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
