"""`EnergyMonitor`: what a training run draws, from NVML's energy counter: joules a token, kWh and CO₂e."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

_JOULES_PER_KWH = 3.6e6


class EnergyReader(Protocol):
    """Counts the energy of this process's device."""

    def joules(self) -> float:
        """Energy drawn since some fixed moment."""
        ...


class NvmlReader:
    """Total energy of one GPU since its driver loaded, from NVML; about every 100 ms a new value.

    It is the whole GPU's: other processes on it count too, CPU, memory and cooling do not.

    Args:
        device: A CUDA device.

    Raises:
        ModuleNotFoundError: nvidia-ml-py is not installed.
        RuntimeError: ``device`` is no CUDA device, NVML cannot be used, or the GPU has no energy counter.
    """

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise RuntimeError(
                f"EnergyMonitor reads NVIDIA GPUs, but the run is on {device.type!r}. Take the callback out, or give "
                "it a reader of your own: EnergyMonitor(reader=...)."
            )
        try:
            import pynvml
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "EnergyMonitor needs nvidia-ml-py: pip install 'lightning-int8[energy]'."
            ) from error
        self._nvml = pynvml
        try:
            pynvml.nvmlInit()
            # By its UUID: CUDA_VISIBLE_DEVICES numbers CUDA's devices anew, not NVML's.
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            self.joules()
        except pynvml.NVMLError as error:
            raise RuntimeError(
                f"EnergyMonitor: NVML gives no total energy for {device} ({error}). It needs NVIDIA's driver and a GPU "
                "of the Volta generation or newer that is not a MIG slice. Take the callback out, or give it a reader "
                "of your own: EnergyMonitor(reader=...)."
            ) from error

    def joules(self) -> float:
        """Energy drawn since the driver loaded."""
        return self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1000.0


class EnergyMonitor(pl.Callback):
    """Measures the energy of training, over all devices of the run, between its first and its last batch.

    Every ``every_n_steps`` optimizer steps the loggers get ``energy/joules_per_token`` (over those steps), and, since
    the run began, ``energy/kwh`` and (given ``grid_intensity``) ``energy/co2e_g``. When training ends a line is printed
    and ``energy.json`` written. Validation within the run counts as energy, its tokens do not. A resumed run goes on
    from the last log entry before its checkpoint. Ranks add up: where several see the same batch, as in tensor
    parallelism, let ``tokens`` divide by their number.

    Args:
        every_n_steps: Optimizer steps between two log entries, at least 1. Reading waits for the device.
        grid_intensity: Grams of CO₂-equivalent a kWh of your electricity causes, such as 400; ``None``: unknown.
        tokens: What counts as tokens of a batch: a key whose tensor's elements are counted, or a function from batch to
            count. ``None``: ``batch["input_ids"]`` or the first tensor of integers with two or more dimensions, where
            there is none samples (the first tensor's length).
        dirpath: Folder for ``energy.json``. ``None``: the logger's folder, or the Trainer's ``default_root_dir``.
        reader: Counts joules of this process's device; ``None``: NVML's counter of the run's GPU.

    Raises:
        ValueError: An argument is not what it may be.
    """

    def __init__(
        self,
        every_n_steps: int = 50,
        grid_intensity: float | None = None,
        tokens: str | Callable[[Any], int] | None = None,
        dirpath: str | None = None,
        reader: EnergyReader | None = None,
    ) -> None:
        if isinstance(every_n_steps, bool) or not isinstance(every_n_steps, int) or every_n_steps < 1:
            raise ValueError(f"EnergyMonitor(every_n_steps={every_n_steps!r}) must be an integer of at least 1.")
        number = isinstance(grid_intensity, (int, float)) and not isinstance(grid_intensity, bool)
        if grid_intensity is not None and not (number and math.isfinite(grid_intensity) and grid_intensity >= 0):
            raise ValueError(
                f"EnergyMonitor(grid_intensity={grid_intensity!r}) must be grams of CO₂e a kWh, a number of at "
                "least 0, or None."
            )
        if tokens is not None and not isinstance(tokens, str) and not callable(tokens):
            raise ValueError(
                f"EnergyMonitor(tokens={tokens!r}) must be a batch's key, a function from batch to count, or None."
            )
        self.every_n_steps = every_n_steps
        self.grid_intensity = grid_intensity
        self.tokens = tokens
        self.dirpath = dirpath
        self.reader = reader
        self.joules = 0.0
        self.tokens_seen = 0
        self._reader: EnergyReader | None = None
        self._last_joules = 0.0
        self._measuring = False
        self._new_tokens = 0
        self._seen_step = 0

    @property
    def kwh(self) -> float:
        """Energy since the run began, in kWh."""
        return self.joules / _JOULES_PER_KWH

    @property
    def joules_per_token(self) -> float:
        """Mean over the run; NaN before the first tokens."""
        return self.joules / self.tokens_seen if self.tokens_seen else math.nan

    @property
    def co2e_grams(self) -> float | None:
        """CO₂-equivalent since the run began; ``None`` without a grid intensity."""
        return None if self.grid_intensity is None else self.kwh * self.grid_intensity

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finds the counter, so that its absence shows before training."""
        self._reader = self.reader or NvmlReader(trainer.strategy.root_device)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts to measure."""
        self._seen_step, self._new_tokens = trainer.global_step, 0
        self._last_joules, self._measuring = self._read(trainer), True

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts the batch's tokens; logs after every ``every_n_steps`` optimizer steps."""
        self._new_tokens += count_tokens(batch, self.tokens)
        if trainer.global_step == self._seen_step:
            return
        self._seen_step = trainer.global_step
        if self._seen_step % self.every_n_steps == 0:
            self._record(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Writes what was measured until then, where that needs no other rank, which may be gone."""
        if self._measuring and trainer.world_size == 1:
            self.on_train_end(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes in the last steps, prints the total and writes ``energy.json``."""
        self._record(trainer)
        self._measuring = False
        # Asked on every rank: it broadcasts.
        folder = self.dirpath or trainer.log_dir or trainer.default_root_dir
        if not trainer.is_global_zero:
            return
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        (path / "energy.json").write_text(json.dumps(self.summary(), indent=2) + "\n")
        try:
            from rich.console import Console
        except ModuleNotFoundError:
            rank_zero_warn("EnergyMonitor: the closing line needs rich: pip install rich.")
        else:
            Console().print(self._line())

    def summary(self) -> dict[str, float | int | None]:
        """What ``energy.json`` holds."""
        return {
            "joules": self.joules,
            "kwh": self.kwh,
            "tokens": self.tokens_seen,
            "joules_per_token": self.joules_per_token if self.tokens_seen else None,
            "grid_intensity_g_per_kwh": self.grid_intensity,
            "co2e_g": self.co2e_grams,
        }

    def state_dict(self) -> dict[str, Any]:
        """Totals, so that a resumed run's are of all its parts."""
        return {"joules": self.joules, "tokens_seen": self.tokens_seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from what ``state_dict`` returned."""
        self.joules, self.tokens_seen = float(state_dict["joules"]), int(state_dict["tokens_seen"])

    def _read(self, trainer: pl.Trainer) -> float:
        assert self._reader is not None
        device = trainer.strategy.root_device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return self._reader.joules()

    def _record(self, trainer: pl.Trainer) -> None:
        now = self._read(trainer)
        joules, tokens = self._over_all_ranks(trainer, now - self._last_joules, self._new_tokens)
        self._last_joules, self._new_tokens = now, 0
        self.joules += joules
        self.tokens_seen += tokens
        if not tokens:
            return
        metrics = {"energy/joules_per_token": joules / tokens, "energy/kwh": self.kwh}
        if self.co2e_grams is not None:
            metrics["energy/co2e_g"] = self.co2e_grams
        for logger in trainer.loggers:
            # The x-axis of everything else that Lightning logs in training.
            logger.log_metrics(metrics, step=trainer.fit_loop.epoch_loop._batches_that_stepped)

    def _over_all_ranks(self, trainer: pl.Trainer, joules: float, tokens: int) -> tuple[float, int]:
        if trainer.world_size == 1:
            return joules, tokens
        device = trainer.strategy.root_device
        total = trainer.strategy.reduce(
            torch.tensor([joules, float(tokens)], dtype=torch.float64, device=device), reduce_op="sum"
        )
        return float(total[0]), round(float(total[1]))

    def _line(self) -> str:
        line = f"Energy: {self.kwh:.4g} kWh for {self.tokens_seen:,} tokens"
        line += f", {self.joules_per_token:.4g} J a token" if self.tokens_seen else ""
        if self.co2e_grams is not None:
            line += f", {self.co2e_grams:.4g} g CO₂e at {self.grid_intensity:g} g a kWh"
        return line


def count_tokens(batch: Any, tokens: str | Callable[[Any], int] | None = None) -> int:
    """Tokens in ``batch``, as :class:`EnergyMonitor`'s ``tokens`` says.

    Raises:
        ValueError: The key is not in the batch, or nothing in it can be counted.
    """
    if callable(tokens):
        return int(tokens(batch))
    if isinstance(tokens, str):
        value = batch.get(tokens) if isinstance(batch, Mapping) else getattr(batch, tokens, None)
        if not isinstance(value, Tensor):
            keys = ", ".join(map(repr, batch)) if isinstance(batch, Mapping) else type(batch).__name__
            raise ValueError(f"EnergyMonitor(tokens={tokens!r}): the batch has no tensor of that name, but {keys}.")
        return value.numel()
    if isinstance(batch, Mapping) and isinstance(batch.get("input_ids"), Tensor):
        return batch["input_ids"].numel()
    found = list(_tensors(batch))
    if not found:
        raise ValueError(
            f"EnergyMonitor finds no tensor in a batch of type {type(batch).__name__}; say how to count its tokens: "
            "EnergyMonitor(tokens=lambda batch: ...)."
        )
    integers = [t for t in found if t.ndim > 1 and not t.is_floating_point() and not t.is_complex()]
    return integers[0].numel() if integers else found[0].shape[0] if found[0].ndim else 1


def _tensors(batch: Any) -> Any:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _tensors(value)
    elif isinstance(batch, (list, tuple)):
        for value in batch:
            yield from _tensors(value)
