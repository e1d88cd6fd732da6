"""Runs that take turns on a device: while one trains, the next one loads, compiles and takes its first steps."""

from __future__ import annotations

import fcntl
import time
from pathlib import Path
from typing import Any, TextIO

import lightning as L
from lightning.pytorch.callbacks import Callback

from examples.recorder import Recorder

# Between two looks whether the other run has ended, in seconds.
PATIENCE = 0.05


class TakeTurns(Callback):
    """Holds a run back after the steps that compile until it has the device to itself.

    Must come before the run's :class:`examples.recorder.Recorder`, whose clock starts with the next step.

    Args:
        file: Locked by the run that has the device; the kernel frees it when that run's process ends, however it ends.
        until: `time.time()` after which the run no longer waits, since it has to stop anyway.
    """

    def __init__(self, file: Path, until: float) -> None:
        self.file = file
        self.until = until
        self._steps = 0
        self._held: TextIO | None = None

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if self._steps == Recorder.WARMUP_STEPS:
            self._wait()
        self._steps += 1

    def release(self) -> None:
        """Gives the device to the next run."""
        if self._held is not None:
            self._held.close()
            self._held = None

    def _wait(self) -> None:
        self._held = open(self.file, "w")  # noqa: SIM115
        while time.time() < self.until:
            try:
                fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                time.sleep(PATIENCE)
