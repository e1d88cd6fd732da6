"""What a probe leaves behind: a table, a CSV file and a heat map."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_int8.probe import SMALL, ProbeResult

if TYPE_CHECKING:
    from rich.table import Table

_TITLES = {"y": "Y", "dx": "dX", "dw": "dW", "dx_small": "dX small", "dw_small": "dW small"}


def summary_table(result: ProbeResult) -> Table:
    """One row a method: median and worst SQNR of the linears, and what it does to the predictions.

    "small": of the tokens with the smallest gradients, where 0 dB says that these are lost. "small kept": how much of
    them arrives at the weights of a whole network, 1 all, 0 nothing.
    """
    from rich import box
    from rich.table import Table

    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"SQNR in dB over {len(result.linears)} linears, median / worst",
        title_justify="left",
    )
    table.add_column("method")
    for quantity in _TITLES:
        table.add_column(_TITLES[quantity], justify="right", no_wrap=True)
    table.add_column("small kept", justify="right", no_wrap=True)
    table.add_column("KL (nats)", justify="right", no_wrap=True)
    table.add_column("same top-1", justify="right")
    for method in sorted(result.kl, key=lambda name: result.kl[name]):
        cells = [f"{median:.1f}/{worst:.1f}" if median == median else "–" for median, worst in _summary(result, method)]
        cells.append("/".join(f"{value:.2f}" for value in _median_and_worst(result.kept(method))))
        table.add_row(method, *cells, f"{result.kl[method]:.2e}", f"{result.top1[method]:.2%}")
    return table


def _summary(result: ProbeResult, method: str) -> list[tuple[float, float]]:
    """Median and worst SQNR over the linears, in the order of the titles."""
    return [_median_and_worst(result.column(method, quantity)) for quantity in _TITLES]


def _median_and_worst(values: Tensor) -> tuple[float, float]:
    """NaN where no linear has one."""
    values = values[~values.isnan()]
    return (float(values.median()), float(values.min())) if len(values) else (float("nan"),) * 2


def write_summary(result: ProbeResult, path: str | Path) -> None:
    """:func:`summary_table` as CSV, and the slopes of small gradients."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        heads = [f"sqnr_{quantity}_db_{which}" for quantity in _TITLES for which in ("median", "worst")]
        heads += [f"slope_{quantity}_{which}" for quantity in SMALL for which in ("median", "worst")]
        heads += ["small_kept_median", "small_kept_worst"]
        writer.writerow(["method", *heads, "kl_nats", "same_top1"])
        for method in result.kl:
            cells = [f"{value:.2f}" for pair in _summary(result, method) for value in pair]
            slopes = [_median_and_worst(result.slopes(method, quantity)) for quantity in SMALL]
            slopes.append(_median_and_worst(result.kept(method)))
            cells += [f"{value:.4f}" for pair in slopes for value in pair]
            writer.writerow([method, *cells, f"{result.kl[method]:.4e}", f"{result.top1[method]:.5f}"])


def outlier_table(result: ProbeResult, count: int = 12) -> Table:
    """The linears with the largest outliers of X or dY."""
    from rich.table import Table

    table = Table(title="Block AbsMax, 99th percentile over median: the largest", title_justify="left")
    for heading in ("linear", "M, K, N", "X", "", "dY", ""):
        table.add_column(heading, overflow="fold")
    for row in sorted(result.linears, key=lambda r: -max(r.x.ratio, r.dy.ratio))[:count]:
        table.add_row(
            row.name,
            ", ".join(map(str, row.shape)),
            f"{row.x.ratio:.1f}",
            row.x.kind,
            f"{row.dy.ratio:.1f}",
            row.dy.kind,
        )
    return table


def write_csv(result: ProbeResult, path: str | Path) -> None:
    """One line a linear and method."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        heads = ["linear", "tokens", "in", "out", "x_ratio", "x_kind", "dy_ratio", "dy_kind", "small_dy", "small_dw"]
        heads += [
            "method",
            *(f"sqnr_{quantity}_db" for quantity in _TITLES),
            *(f"slope_{quantity}" for quantity in SMALL),
        ]
        heads.append("small_kept")
        writer.writerow(heads)
        for row in result.linears:
            outliers = [f"{row.x.ratio:.3f}", row.x.kind, f"{row.dy.ratio:.3f}", row.dy.kind]
            small = [f"{row.small_dy:.3e}", f"{row.small_dw:.3e}"]
            for method, values in row.sqnr.items():
                slopes = (*row.slope[method], row.kept[method])
                cells = [*(f"{value:.2f}" for value in values), *(f"{value:.4f}" for value in slopes)]
                writer.writerow([row.name, *row.shape, *outliers, *small, method, *cells])


def draw(result: ProbeResult, path: str | Path) -> None:
    """A heat map of the SQNR, linears by methods, one panel a quantity, as PNG."""
    from matplotlib.figure import Figure

    names = list(result.kl)
    size = (3.0 + 3.5 * len(_TITLES), max(3.0, min(30.0, 2.0 + 0.14 * len(result.linears))))
    figure = Figure(figsize=size, layout="constrained", dpi=120)
    panels = figure.subplots(1, len(_TITLES), sharey=True, squeeze=False)[0]
    image = None
    for panel, quantity in zip(panels, _TITLES, strict=True):
        values = [result.column(name, quantity).clamp(max=60).tolist() for name in names]
        image = panel.imshow(
            list(zip(*values, strict=True)), aspect="auto", vmin=0, vmax=45, cmap="viridis", interpolation="nearest"
        )
        panel.set_title(_TITLES[quantity])
        panel.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=7)
    panels[0].set_yticks(range(len(result.linears)), [row.name for row in result.linears], fontsize=5)
    assert image is not None
    figure.colorbar(image, ax=list(panels), label="SQNR (dB)")
    figure.savefig(path)
