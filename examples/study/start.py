"""Where a run of the study starts: at random weights, at another run's, or in the middle of another run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from examples.recorder import Recorder
from examples.study.plan import Run

WEIGHTS = "weights.pt"
BRANCH = "branch.ckpt"


def starting_file(run: Run, study: Path) -> Path | None:
    """The file below ``study`` that ``run`` starts from; ``None`` where it starts at random weights."""
    if run.parent is None:
        return None
    return study / run.parent / (WEIGHTS if run.init_from is not None else BRANCH)


def tokens_to_train(run: Run, shared: dict[str, Any]) -> int:
    """How many tokens ``run`` trains on itself."""
    share = run.share * (1 - shared["branch_at"] if run.branch_from is not None else 1)
    return int(shared["tokens"] * share)


class KeepBranch(Callback):
    """Saves the checkpoint that other runs go on with.

    Args:
        step: After which step.
        file: Where.
    """

    def __init__(self, step: int, file: Path) -> None:
        self.step = step
        self.file = file

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.file)


class OwnSpeed(Callback):
    """Makes a run that goes on with another's checkpoint measure its own throughput alone.

    Args:
        recorder: Of the run.
    """

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.recorder.curve.train_seconds = 0.0
        self.recorder.curve.train_tokens = 0
