"""What one training run measured, and the callback that records it."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback


@dataclass
class Curve:
    """What one run measured.

    Attributes:
        train_loss: Loss of every step, the mean over its micro-batches.
        val_loss: Held-out loss after some steps, the last one included.
        fallback_rate: By step, the mean over layers and operands (and the steps since the last) of the share of blocks
            that fell back; empty for a recipe without fallback.
        train_seconds: Time of the measured steps, without evaluation and checkpoints.
        train_tokens: Tokens trained on in that time.
    """

    train_loss: dict[int, float] = field(default_factory=dict)
    val_loss: dict[int, float] = field(default_factory=dict)
    fallback_rate: dict[int, float] = field(default_factory=dict)
    train_seconds: float = 0.0
    train_tokens: int = 0

    @property
    def final_train_loss(self) -> float:
        """Mean training loss over the last tenth of the steps; single steps vary with their batch."""
        losses = list(self.train_loss.values())
        tail = losses[-max(1, len(losses) // 10) :]
        return sum(tail) / len(tail)

    @property
    def final_val_loss(self) -> float:
        """Held-out loss after the last step."""
        return self.val_loss[max(self.val_loss)]

    @property
    def mean_fallback_rate(self) -> float | None:
        """Mean over steps, layers and operands; ``None`` for a recipe without fallback."""
        rates = list(self.fallback_rate.values())
        return sum(rates) / len(rates) if rates else None

    @property
    def tokens_per_second(self) -> float:
        """Training throughput."""
        return self.train_tokens / self.train_seconds if self.train_seconds else float("nan")


class Recorder(Callback):
    """Fills a :class:`Curve` without making the device wait: values stay on it until the run ends."""

    # The first steps compile kernels and fill caches.
    WARMUP_STEPS = 3

    def __init__(self) -> None:
        self.curve = Curve()
        self._losses: dict[int, torch.Tensor] = {}
        self._micro_batches: list[torch.Tensor] = []
        self._step_before = 0
        self._resumed_at: float | None = None

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if self._resumed_at is None and len(self._losses) >= self.WARMUP_STEPS:
            _synchronize()
            self._resumed_at = time.perf_counter()
        self._step_before = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Lightning has divided it for the sum of the gradients.
        self._micro_batches.append(outputs["loss"].detach() * trainer.accumulate_grad_batches)
        if trainer.global_step > self._step_before:
            self._losses[trainer.global_step] = torch.stack(self._micro_batches).mean()
            self._micro_batches.clear()
        if self._resumed_at is not None:
            self.curve.train_tokens += batch[:, 1:].numel()

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._stop_clock()

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.curve.val_loss[trainer.global_step] = float(trainer.callback_metrics["val_loss"])

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._stop_clock()
        self.curve.train_loss |= {step: float(loss) for step, loss in self._losses.items()}

    def state_dict(self) -> dict[str, Any]:
        """What was measured so far, so that a resumed run's curve is whole."""
        # Lightning calls this before `on_save_checkpoint`.
        self._stop_clock()
        losses = self.curve.train_loss | {step: float(loss) for step, loss in self._losses.items()}
        return dataclasses.asdict(self.curve) | {"train_loss": losses}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues what ``state_dict`` returned."""
        self.curve = Curve(**state_dict)

    def _stop_clock(self) -> None:
        if self._resumed_at is not None:
            _synchronize()
            self.curve.train_seconds += time.perf_counter() - self._resumed_at
            self._resumed_at = None


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
