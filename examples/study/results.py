"""What the study leaves behind: final losses and curves as CSV, plots, and a page with the table."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from examples.study.plan import Run

Finished = Sequence[tuple[Run, dict[str, Any]]]
# What the runs over seeds have in common.
SEEDS = Run(name="seeds")
COLUMNS = (
    "run",
    "held_out_loss",
    "gap_percent",
    "gap_in_seed_deviations",
    "weights_gap_percent",
    "train_loss",
    "late_gap_millinats",
    "late_gap_error",
    "fallback_rate",
    "extra_mmas",
    "tokens_per_second",
    "tokens",
    "device",
)


def write_results(folder: Path, finished: Finished, shared: dict[str, Any]) -> None:
    """Writes ``results.csv``, ``curves.csv``, ``curves.png``, ``fallback_rate.csv`` and ``study.md``."""
    rows = _rows(folder, finished)
    with open(folder / "results.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    with open(folder / "curves.csv", "w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["run", "step", "train_loss", "held_out_loss"])
        for run, result in finished:
            curve = result["curve"]
            for step, loss in curve["train_loss"].items():
                lines.writerow([run.name, step, f"{loss:.6f}", curve["val_loss"].get(step, "")])
    _join_fallback_rates(folder, finished)
    _draw(folder / "curves.png", finished)
    (folder / "study.md").write_text(_page(rows, _over_seeds(finished), shared))


def _group(run: Run) -> tuple[str, ...]:
    """What two runs must share for their losses to be compared."""
    return (json.dumps(run.model, sort_keys=True), run.objective, run.corpus, str(run.parent), str(run.share))


def _baseline(finished: Finished, run: Run) -> dict[str, Any] | None:
    """Result of the BF16 run that differs from ``run`` in its precision alone; ``None`` without another such.

    For a BF16 run that branches, it is the run it branches from, which shows the noise.
    """
    for other, result in finished:
        if other.full_precision and (_group(other), other.seed) == (_group(run), run.seed):
            if other is not run:
                return result
            break
    return next((result for other, result in finished if other.name == run.branch_from), None)


def _late_gap(result: dict[str, Any], base: dict[str, Any]) -> tuple[float, float] | None:
    """Mean gap of the training losses over the last quarter of the steps, and its standard error, in 10^-3 nats.

    On the same batches, so that it shows what is far below the noise of a loss. Without the 2 % largest and the 2 %
    smallest gaps, since on a rare batch the loss of any run jumps by a hundred times what is looked for. ``None`` for
    fewer than two steps.
    """
    mine, other = result["curve"]["train_loss"], base["curve"]["train_loss"]
    gaps = sorted(1e3 * (loss - other[step]) for step, loss in mine.items() if int(step) > 0.75 * result["steps"])
    if len(gaps) < 2:
        return None
    gaps = gaps[len(gaps) // 50 : len(gaps) - len(gaps) // 50]
    return statistics.mean(gaps), statistics.stdev(gaps) / len(gaps) ** 0.5


def _rows(folder: Path, finished: Finished) -> list[dict[str, Any]]:
    deviation = _seed_deviation(finished)
    rows = []
    for run, result in finished:
        base = _baseline(finished, run)
        row = dict.fromkeys(COLUMNS, "")
        row |= {
            "run": run.name,
            "held_out_loss": f"{result['val_loss']:.5f}",
            "train_loss": f"{result['train_loss']:.5f}",
            "fallback_rate": _mean_rate(folder / run.name),
            "extra_mmas": "" if result["extra_mmas"] is None else f"{result['extra_mmas']:.3f}",
            "tokens_per_second": f"{result['tokens_per_second']:.0f}",
            "tokens": str(result["tokens"]),
            "device": result["device"],
        }
        if base is not None:
            gap = result["val_loss"] - base["val_loss"]
            row["gap_percent"] = f"{100 * gap / base['val_loss']:+.3f}"
            row["weights_gap_percent"] = f"{100 * (result['val_loss_full_precision'] / base['val_loss'] - 1):+.3f}"
            if (late := _late_gap(result, base)) is not None:
                row |= {"late_gap_millinats": f"{late[0]:+.2f}", "late_gap_error": f"{late[1]:.2f}"}
            if deviation and _group(run) == _group(SEEDS):
                row["gap_in_seed_deviations"] = f"{gap / deviation:+.1f}"
        rows.append(row)
    return rows


def _seed_deviation(finished: Finished) -> float | None:
    """Standard deviation of the BF16 runs' held-out losses over seeds; ``None`` for fewer than two."""
    losses = [result["val_loss"] for run, result in finished if run.full_precision and _group(run) == _group(SEEDS)]
    return statistics.stdev(losses) if len(losses) > 1 else None


def _over_seeds(finished: Finished) -> list[dict[str, Any]]:
    """Held-out losses of the recipes with several seeds: mean, deviation, and gap to BF16's mean."""
    losses: dict[str, list[float]] = {}
    names: dict[str, str] = {}
    for run, result in finished:
        if _group(run) == _group(SEEDS):
            losses.setdefault(run.kind, []).append(result["val_loss"])
            names.setdefault(run.kind, run.name)
    base = losses.get(SEEDS.kind, [])
    rows = []
    for kind, values in losses.items():
        if len(values) > 1 and len(base) > 1:
            gap = statistics.mean(values) - statistics.mean(base)
            error = (statistics.variance(values) / len(values) + statistics.variance(base) / len(base)) ** 0.5
            rows.append(
                {
                    "run": names[kind],
                    "seeds": len(values),
                    "held_out_loss": f"{statistics.mean(values):.5f}",
                    "deviation": f"{statistics.stdev(values):.5f}",
                    "gap": "" if kind == SEEDS.kind else f"{gap:+.5f}",
                    "gap_error": "" if kind == SEEDS.kind else f"{error:.5f}",
                }
            )
    return rows


def _mean_rate(folder: Path) -> str:
    file = folder / "fallback_rate.csv"
    if not file.exists():
        return ""
    with open(file, newline="") as lines:
        return f"{statistics.mean(float(line['rate']) for line in csv.DictReader(lines)):.3f}"


def _join_fallback_rates(folder: Path, finished: Finished) -> None:
    with open(folder / "fallback_rate.csv", "w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["run", "step", "layer", "operand", "rate", "threshold"])
        for run, _ in finished:
            file = folder / run.name / "fallback_rate.csv"
            if file.exists():
                with open(file, newline="") as lines:
                    writer.writerows([run.name, *line] for line in list(csv.reader(lines))[1:])


def _draw(file: Path, finished: Finished) -> None:
    """Held-out losses over tokens, and below the gap of the smoothed training losses to BF16's on the same batches."""
    groups: dict[tuple[str, ...], list[tuple[Run, dict[str, Any]]]] = {}
    for run, result in finished:
        groups.setdefault(_group(run), []).append((run, result))
    figure = Figure(figsize=(5.5 * len(groups), 7), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, len(groups), squeeze=False, height_ratios=[3, 2])
    for column, members in enumerate(groups.values()):
        upper, lower = panels[:, column]
        for run, result in members:
            tokens_a_step = result["tokens"] / result["steps"]
            held_out = {int(step): loss for step, loss in result["curve"]["val_loss"].items()}
            (line,) = upper.plot([s * tokens_a_step for s in held_out], list(held_out.values()), ".-", label=run.name)
            losses = {int(step): loss for step, loss in result["curve"]["train_loss"].items()}
            if (base := _baseline(finished, run)) is not None:
                full = {int(step): loss for step, loss in base["curve"]["train_loss"].items()}
                # A run that branches has its parent's losses until there.
                steps = _from_first_difference(losses, full)
                gaps = _smooth([100 * (losses[s] / full[s] - 1) for s in steps])
                lower.plot([s * tokens_a_step for s in steps], gaps, lw=1, color=line.get_color())
        upper.set_title(members[0][0].name)
        upper.set_ylabel("held-out loss (nats per token)")
        upper.legend(fontsize=7)
        lower.axhline(0, color="gray", lw=0.5)
        lower.set_ylabel("train loss against BF16 on the same batches (%)")
        lower.set_xlabel("tokens")
    figure.savefig(file, dpi=110)


def _from_first_difference(losses: dict[int, float], others: dict[int, float]) -> list[int]:
    steps = sorted(losses)
    first = next((i for i, step in enumerate(steps) if losses[step] != others[step]), len(steps))
    return steps[first:]


def _smooth(values: list[float], memory: float = 0.9) -> list[float]:
    smoothed: list[float] = []
    for value in values:
        smoothed.append(memory * smoothed[-1] + (1 - memory) * value if smoothed else value)
    return smoothed


def _page(rows: list[dict[str, Any]], over_seeds: list[dict[str, Any]], shared: dict[str, Any]) -> str:
    heading = f"# Study, {shared['tokens']:,} tokens a run\n\n"
    return heading + _table(rows) + ("\nOver seeds:\n\n" + _table(over_seeds) if over_seeds else "")


def _table(rows: list[dict[str, Any]]) -> str:
    columns = list(rows[0])
    table = "| " + " | ".join(columns).replace("_", " ") + " |\n" + "|---" * len(columns) + "|\n"
    return table + "".join("| " + " | ".join(str(row[column]) for column in columns) + " |\n" for row in rows)
