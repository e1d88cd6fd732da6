"""`FallbackRateMonitor`: what the thresholds do in a run, to the loggers while it runs and as a picture at its end."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torchmetrics import Metric

from lightning_int8.linear import Int8Linear
from lightning_int8.threshold import RATE, THRESHOLD, FallbackState, fallback_states, rows_in_use

if TYPE_CHECKING:
    from rich.table import Table


class FallbackRate(Metric):
    """Mean fallback rate and last threshold of each operand over the optimizer steps since ``reset``.

    Accumulates on the device. Ranks hold identical thresholds and rates, so nothing is reduced between them.

    Args:
        rows: Number of operands of all layers together.
    """

    full_state_update = False
    rate_sum: Tensor
    updates: Tensor
    threshold: Tensor

    def __init__(self, rows: int) -> None:
        super().__init__(sync_on_compute=False)
        self.add_state("rate_sum", torch.zeros(rows), dist_reduce_fx=None)
        self.add_state("updates", torch.zeros(rows), dist_reduce_fx=None)
        self.add_state("threshold", torch.full((rows,), float("nan")), dist_reduce_fx=None)

    def update(self, table: Tensor) -> None:
        """Adds one step.

        Args:
            table: ``FallbackState.tensor`` of all layers, float32 ``[rows, 5]``. A rate of NaN (no blocks seen yet) is
                left out of the mean.
        """
        rate = table[:, RATE]
        seen = rate.isfinite()
        self.rate_sum += rate.where(seen, 0.0)
        self.updates += seen
        self.threshold = table[:, THRESHOLD].clone()

    def compute(self) -> Tensor:
        """Float32 ``[2, rows]``: mean rates (NaN where nothing was seen) and last thresholds."""
        return torch.stack([self.rate_sum / self.updates, self.threshold])


class FallbackRateMonitor(pl.Callback):
    """Logs each INT8 layer's fallback rates and thresholds, and draws them when the run ends.

    Every ``every_n_steps`` optimizer steps the Trainer's loggers get, for each layer and operand,
    ``fallback_rate/<layer>/<operand>`` (mean over those steps) and ``fallback_threshold/<layer>/<operand>``, and
    ``fallback_rate/mean``. An operand that saw no blocks has no entry: the gradient of a first layer's input, or the
    input of a layer whose sibling quantizes it for both. Other steps only add on the device, without waiting for it.
    When training ends (also by an error) ``fallback_rate.csv`` and ``fallback_rate.png`` (layers by steps, one panel an
    operand) are written, and a table of the extremes is printed.

    Args:
        every_n_steps: Optimizer steps between two log entries, at least 1.
        dirpath: Folder for the CSV and PNG. ``None``: the logger's folder, or the Trainer's ``default_root_dir``.

    Raises:
        ValueError: ``every_n_steps`` is not a positive integer.
    """

    def __init__(self, every_n_steps: int = 50, dirpath: str | None = None) -> None:
        if isinstance(every_n_steps, bool) or not isinstance(every_n_steps, int) or every_n_steps < 1:
            raise ValueError(f"FallbackRateMonitor(every_n_steps={every_n_steps!r}) must be an integer of at least 1.")
        self.every_n_steps = every_n_steps
        self.dirpath = dirpath
        self.labels: list[tuple[str, str]] = []
        self.steps: list[int] = []
        self._entries: list[Tensor] = []
        self._metric: FallbackRate | None = None
        self._states: list[FallbackState] = []
        self._rows: Tensor | None = None
        self._seen_step = 0
        self._restored: dict[str, Any] | None = None

    @property
    def rates(self) -> Tensor:
        """Mean fallback rates, float32 ``[entries, labels]`` on the CPU: row ``i`` is ``steps[i]``."""
        return self._history()[:, 0]

    @property
    def thresholds(self) -> Tensor:
        """Thresholds, laid out as ``rates``."""
        return self._history()[:, 1]

    @property
    def mean_rate(self) -> float:
        """Mean fallback rate over all layers, operands and logged steps; NaN before the first entry."""
        return float(self.rates.nanmean()) if self.steps else float("nan")

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not any(isinstance(child, Int8Linear) for child in pl_module.modules()):
            raise ValueError(
                f"FallbackRateMonitor: {type(pl_module).__qualname__} has no INT8 layers. Give the Trainer "
                "plugins=lightning_int8.FallbackInt8Precision(), or take the callback out."
            )
        states = fallback_states(pl_module)
        if not states:
            rank_zero_warn("FallbackRateMonitor: the recipe has no block fallback, so there is nothing to monitor.")
        self._states = list(states.values())
        rows = [
            (name, operand, state.band(operand)[1] > 0) for name, state in states.items() for operand in state.operands
        ]
        # An operand whose band is zero never falls back.
        self._rows = torch.tensor([index for index, (_, _, falls_back) in enumerate(rows) if falls_back])
        self.labels = [(name, operand) for name, operand, falls_back in rows if falls_back]
        self._metric = FallbackRate(len(self.labels)).to(trainer.strategy.root_device)
        self._rows = self._rows.to(trainer.strategy.root_device)
        self._seen_step = trainer.global_step
        if self._entries and (self._entries[0].shape[1] != len(self.labels) or self._seen_step < self.steps[-1]):
            self.steps, self._entries = [], []
        self._restore()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self.labels or trainer.global_step == self._seen_step:
            return
        self._seen_step = trainer.global_step
        assert self._metric is not None
        assert self._rows is not None
        table = rows_in_use(state.on(self._rows.device) for state in self._states)
        self._metric.update(table[self._rows])
        if self._seen_step % self.every_n_steps == 0:
            self._record(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._finish(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        # Only what needs no other rank, which may be gone.
        if trainer.state.fn == TrainerFn.FITTING and self._metric is not None and trainer.world_size == 1:
            self._finish(trainer)

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"labels": [list(label) for label in self.labels], "steps": list(self.steps)}
        state["history"] = self._history()
        if self._metric is not None:
            metric = self._metric
            state["window"] = torch.stack([metric.rate_sum, metric.updates, metric.threshold]).cpu()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict

    def _restore(self) -> None:
        saved, self._restored = self._restored, None
        if saved is None:
            return
        if [tuple(label) for label in saved["labels"]] != self.labels:
            rank_zero_warn(
                "FallbackRateMonitor: the checkpoint monitored other layers or operands; starting a new history."
            )
            return
        self.steps = list(saved["steps"])
        self._entries = list(saved["history"].unbind(0))
        if "window" in saved:
            assert self._metric is not None
            window = saved["window"].to(self._metric.device)
            self._metric.rate_sum, self._metric.updates, self._metric.threshold = (row.clone() for row in window)
            self._metric._update_count = 1

    def _history(self) -> Tensor:
        return torch.stack(self._entries) if self._entries else torch.zeros(0, 2, len(self.labels))

    def _record(self, trainer: pl.Trainer) -> None:
        assert self._metric is not None
        entry = self._metric.compute().cpu()
        self._metric.reset()
        self.steps.append(self._seen_step)
        self._entries.append(entry)
        metrics = {"fallback_rate/mean": float(entry[0].nanmean())}
        for (layer, operand), rate, threshold in zip(self.labels, *entry.tolist(), strict=True):
            if math.isnan(rate):
                continue
            metrics[f"fallback_rate/{layer}/{operand}"] = rate
            metrics[f"fallback_threshold/{layer}/{operand}"] = threshold
        for logger in trainer.loggers:
            # The x-axis of everything else that Lightning logs in training.
            logger.log_metrics(metrics, step=trainer.fit_loop.epoch_loop._batches_that_stepped)

    def _finish(self, trainer: pl.Trainer) -> None:
        if not self.labels:
            return
        assert self._metric is not None
        if self._metric.update_count and float(self._metric.updates.sum()) > 0:
            self._record(trainer)
        # Asked on every rank: it broadcasts.
        folder = self.dirpath or trainer.log_dir or trainer.default_root_dir
        if not self.steps or not trainer.is_global_zero:
            return
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        self.write_csv(path / "fallback_rate.csv")
        written = "fallback_rate.csv"
        try:
            self.draw(path / "fallback_rate.png")
            written += " and fallback_rate.png"
        except ModuleNotFoundError as error:
            rank_zero_warn(f"FallbackRateMonitor: the heat map needs matplotlib ({error}): pip install matplotlib.")
        rank_zero_info(f"FallbackRateMonitor: wrote {written} to {path}.")
        try:
            from rich.console import Console
        except ModuleNotFoundError:
            rank_zero_warn("FallbackRateMonitor: the table of extremes needs rich: pip install rich.")
        else:
            Console().print(self.table())

    def write_csv(self, path: str | Path) -> None:
        """Writes ``step, layer, operand, rate, threshold`` lines; none for an operand that saw no blocks."""
        with open(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["step", "layer", "operand", "rate", "threshold"])
            for step, rates, thresholds in zip(self.steps, self.rates.tolist(), self.thresholds.tolist(), strict=True):
                for (layer, operand), rate, threshold in zip(self.labels, rates, thresholds, strict=True):
                    if math.isnan(rate):
                        continue
                    writer.writerow([step, layer, operand, f"{rate:.6g}", f"{threshold:.6g}"])

    def draw(self, path: str | Path) -> None:
        """Draws the rates as a heat map, layers by steps, one panel an operand, and saves it as PNG."""
        from matplotlib.figure import Figure

        operands = list(dict.fromkeys(operand for _, operand in self.labels))
        rows = max(sum(operand == wanted for _, operand in self.labels) for wanted in operands)
        size = (2.0 + 4.5 * len(operands), max(3.0, min(30.0, 1.5 + 0.16 * rows)))
        figure = Figure(figsize=size, layout="constrained", dpi=120)
        panels = figure.subplots(1, len(operands), squeeze=False)[0]
        image = None
        first_layers: list[str] = []
        for panel, operand in zip(panels, operands, strict=True):
            columns = [index for index, label in enumerate(self.labels) if label[1] == operand]
            image = panel.imshow(
                self.rates[:, columns].T.numpy(),
                aspect="auto",
                vmin=0.0,
                vmax=1.0,
                cmap="viridis",
                interpolation="nearest",
            )
            panel.set_facecolor("lightgrey")
            panel.set_title(operand)
            panel.set_xlabel("optimizer step")
            ticks = _spread(len(self.steps), 6)
            panel.set_xticks(ticks, [str(self.steps[tick]) for tick in ticks])
            # Names at every row up to what fits, on the first panel only unless the panels differ.
            marked = _spread(len(columns), 150)
            panel.set_yticks(marked, [self.labels[columns[row]][0] for row in marked], fontsize=5)
            layers = [self.labels[column][0] for column in columns]
            first_layers = layers if panel is panels[0] else first_layers
            panel.tick_params(labelleft=panel is panels[0] or layers != first_layers)
        assert image is not None
        figure.colorbar(image, ax=list(panels), label="fallback rate (grey: no blocks seen)")
        figure.savefig(path)

    def table(self, count: int = 5) -> Table:
        """A rich table of the ``count`` highest and lowest mean rates over the run, with the last thresholds."""
        from rich.table import Table

        table = Table(title="Fallback rates: extremes", title_justify="left")
        for heading in ("layer", "operand", "mean rate", "last rate", "last threshold"):
            table.add_column(heading, overflow="fold", justify="left" if heading in ("layer", "operand") else "right")
        means = self.rates.nanmean(0)
        ranked = sorted((i for i in range(len(self.labels)) if means[i].isfinite()), key=lambda i: -float(means[i]))
        shown = ranked if len(ranked) <= 2 * count else [*ranked[:count], *ranked[-count:]]
        for position, index in enumerate(shown):
            last, threshold = (float(value) for value in self._entries[-1][:, index])
            cells = f"{means[index]:.3f}", f"{last:.3f}", f"{threshold:.3g}"
            table.add_row(*self.labels[index], *cells, end_section=len(shown) < len(ranked) and position == count - 1)
        return table


def _spread(length: int, most: int) -> Sequence[int]:
    """At most ``most`` indices, evenly over ``range(length)``, the first and last among them."""
    if length <= most:
        return range(length)
    return [round(i * (length - 1) / (most - 1)) for i in range(most)]
