"""What a probe leaves behind: a table, a CSV file and a heat map."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_int8.probe import GEMMS, ProbeResult

if TYPE_CHECKING:
    from rich.table import Table

_TITLES = {"y": "Y", "dx": "dX", "dw": "dW"}


def summary_table(result: ProbeResult) -> Table:
    """One row a method: median and worst SQNR of the linears, and what it does to the predictions."""
    from rich.table import Table

    table = Table(title=f"SQNR in dB over {len(result.linears)} linears, median / worst", title_justify="left")
    table.add_column("method")
    for gemm in GEMMS:
        table.add_column(_TITLES[gemm], justify="right", no_wrap=True)
    table.add_column("KL (nats)", justify="right")
    table.add_column("same top-1", justify="right")
    for method in sorted(result.kl, key=lambda name: result.kl[name]):
        cells = [
            f"{median:.1f} / {worst:.1f}" if median == median else "–" for median, worst in _summary(result, method)
        ]
        table.add_row(method, *cells, f"{result.kl[method]:.2e}", f"{result.top1[method]:.2%}")
    return table


def _summary(result: ProbeResult, method: str) -> list[tuple[float, float]]:
    """Median and worst SQNR of Y, dX and dW over the linears; NaN where no linear has one."""
    columns = [result.column(method, gemm) for gemm in GEMMS]
    columns = [values[~values.isnan()] for values in columns]
    return [(float(v.median()), float(v.min())) if len(v) else (float("nan"),) * 2 for v in columns]


def write_summary(result: ProbeResult, path: str | Path) -> None:
    """:func:`summary_table` as CSV."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        heads = [f"sqnr_{gemm}_db_{which}" for gemm in GEMMS for which in ("median", "worst")]
        writer.writerow(["method", *heads, "kl_nats", "same_top1"])
        for method in result.kl:
            cells = [f"{value:.2f}" for pair in _summary(result, method) for value in pair]
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
        writer.writerow(
            ["linear", "tokens", "in", "out", "x_ratio", "x_kind", "dy_ratio", "dy_kind", "method"]
            + [f"sqnr_{gemm}_db" for gemm in GEMMS]
        )
        for row in result.linears:
            outliers = [f"{row.x.ratio:.3f}", row.x.kind, f"{row.dy.ratio:.3f}", row.dy.kind]
            for method, values in row.sqnr.items():
                writer.writerow([row.name, *row.shape, *outliers, method, *(f"{value:.2f}" for value in values)])


def draw(result: ProbeResult, path: str | Path) -> None:
    """A heat map of the SQNR, linears by methods, one panel a GEMM, as PNG."""
    from matplotlib.figure import Figure

    names = list(result.kl)
    size = (3.0 + 3.5 * len(GEMMS), max(3.0, min(30.0, 2.0 + 0.14 * len(result.linears))))
    figure = Figure(figsize=size, layout="constrained", dpi=120)
    panels = figure.subplots(1, len(GEMMS), sharey=True, squeeze=False)[0]
    image = None
    for panel, gemm in zip(panels, GEMMS, strict=True):
        values = [result.column(name, gemm).clamp(max=60).tolist() for name in names]
        image = panel.imshow(
            list(zip(*values, strict=True)), aspect="auto", vmin=10, vmax=45, cmap="viridis", interpolation="nearest"
        )
        panel.set_title(_TITLES[gemm])
        panel.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=7)
    panels[0].set_yticks(range(len(result.linears)), [row.name for row in result.linears], fontsize=5)
    assert image is not None
    figure.colorbar(image, ax=list(panels), label="SQNR (dB)")
    figure.savefig(path)
