"""One run of the study: trains, resumes where an earlier call stopped, and leaves `result.json` when it is done."""

from __future__ import annotations

import json
import math
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from examples.model import LlamaModule
from examples.recorder import Recorder
from examples.study.corpus import StudyData
from examples.study.module import StudyModule
from examples.study.plan import Run
from examples.study.start import BRANCH, WEIGHTS, KeepBranch, OwnSpeed
from examples.study.turns import TakeTurns
from lightning_int8 import FallbackInt8Precision, FallbackRateMonitor, Int8Linear
from lightning_int8.bench.precisions import precisions
from lightning_int8.checkpoint import VerifiedCheckpointIO
from lightning_int8.plugin_core import OuterPrecision

IGNORED = ["lm_head"]
# A run that is cut off loses at most this.
CHECKPOINT_EVERY = timedelta(minutes=10)


class OutOfTimeError(RuntimeError):
    """A run has reached its time limit, and has saved a checkpoint.

    Args:
        step: The step it holds.
        steps: How many the run has.
        first: After which of them it branched from another run.
    """

    def __init__(self, step: int, steps: int, first: int = 0) -> None:
        super().__init__(f"stopped after {step} of {steps} steps")
        self.share_done = (step - first) / (steps - first)


class StopAt(Callback):
    """Saves a checkpoint and ends the run when its time is over; ends it without one when its loss is not finite.

    Args:
        when: The end by `time.time()`.
        file: The checkpoint.
        first: After which step the run branched from another.
    """

    def __init__(self, when: float, file: Path, first: int) -> None:
        self.when = when
        self.file = file
        self.first = first

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # A run that stopped before the evaluation of its last step would go on without it.
        if trainer.global_step % int(trainer.val_check_interval):
            self._stop_when_over(trainer)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        loss = float(trainer.callback_metrics["val_loss"])
        if not math.isfinite(loss):
            raise RuntimeError(f"the held-out loss is {loss} after step {trainer.global_step}: the run is lost")
        self._stop_when_over(trainer)

    def _stop_when_over(self, trainer: L.Trainer) -> None:
        if time.time() >= self.when and trainer.global_step < trainer.max_steps:
            trainer.save_checkpoint(self.file)
            raise OutOfTimeError(trainer.global_step, trainer.max_steps, self.first)


def train(
    run: Run,
    shared: dict[str, Any],
    folder: Path,
    start: Path | None,
    stop_at: float = math.inf,
    turns: Path | None = None,
) -> dict[str, Any]:
    """Trains ``run`` in ``folder``, or returns the result that lies there already.

    Args:
        run: What to train.
        shared: What all runs share: the study's YAML with the command line's changes.
        folder: For the checkpoint and the results; made if missing.
        start: The file that it starts from, see :mod:`examples.study.start`.
        stop_at: `time.time()` at which it stops.
        turns: Locked by whichever run has the device, see :mod:`examples.study.turns`; ``None``: this one has it.

    Returns:
        What ``result.json`` holds.

    Raises:
        OutOfTimeError: It has stopped; another call goes on where it was.
        RuntimeError: The held-out loss is not finite.
        ValueError: ``folder`` holds results of another configuration.
    """
    folder.mkdir(parents=True, exist_ok=True)
    digest = run.digest(shared)
    _check_digest(folder, digest)
    if (folder / "result.json").exists():
        return json.loads((folder / "result.json").read_text())

    began = time.perf_counter()
    data = StudyData(corpus=run.corpus, seed=run.seed, **shared["data"])
    tokens_a_step = data.batch_size * data.sequence_length
    steps = max(1, int(shared["tokens"] * run.share) // tokens_a_step)
    on_gpu = torch.cuda.is_available() and shared["accelerator"] != "cpu"
    L.seed_everything(run.seed, verbose=False)
    module = _module(run, shared, steps, on_gpu)
    if start is not None and run.init_from is not None:
        module.load_state_dict(torch.load(start, map_location="cpu", weights_only=True))
    if run.peer is not None:
        precisions([], [run.peer])[-1].convert(module, IGNORED)
    recorder = Recorder()
    evaluate_every = max(1, math.ceil(steps / shared["evaluations"]))
    waits = None if turns is None else TakeTurns(turns, stop_at)
    callbacks: list[Callback] = [
        *([] if waits is None else [waits]),
        recorder,
        ModelCheckpoint(
            dirpath=folder, filename="last", train_time_interval=CHECKPOINT_EVERY, enable_version_counter=False
        ),
    ]
    precision: OuterPrecision = "bf16-mixed" if on_gpu else "32-true"
    monitor: FallbackRateMonitor | None = None
    plugins: list[Any] = [VerifiedCheckpointIO()]
    options: dict[str, Any] = {}
    if run.recipe is None:
        options["precision"] = precision
    else:
        plugins.append(FallbackInt8Precision(recipe=run.recipe, precision=precision, ignore_modules=IGNORED))
        if run.recipe.falls_back:
            monitor = FallbackRateMonitor(every_n_steps=max(1, steps // 50), dirpath=str(folder))
            callbacks.append(monitor)
    branch_step = max(1, int(steps * shared["branch_at"]))
    if run.keep_branch:
        callbacks.append(KeepBranch(branch_step, folder / BRANCH))
    checkpoint = resumed = folder / "last.ckpt"
    if run.branch_from is not None and not checkpoint.exists():
        assert start is not None
        resumed = start
        callbacks.append(OwnSpeed(recorder))
    # Last, so that its checkpoint holds what the others did in the same step.
    callbacks.append(StopAt(stop_at, checkpoint, 0 if run.branch_from is None else branch_step))
    trainer = L.Trainer(
        accelerator="gpu" if on_gpu else "cpu",
        devices=1,
        max_steps=steps,
        val_check_interval=evaluate_every,
        check_val_every_n_epoch=None,
        limit_val_batches=shared["val_batches"],
        num_sanity_val_steps=0,
        # torchao's FP8 rowwise linears fail under inference mode.
        inference_mode=False,
        gradient_clip_val=1.0,
        logger=False,
        callbacks=callbacks,
        plugins=plugins,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, datamodule=data, ckpt_path=resumed if resumed.exists() else None)
    if steps not in recorder.curve.val_loss:
        trainer.validate(module, datamodule=data, verbose=False)
    curve = recorder.curve
    plain = curve.final_val_loss
    if not run.full_precision:
        plain = _validate_in_full_precision(module, _module(run, shared, steps, on_gpu), data, shared, precision)
    if waits is not None:
        waits.release()
    result = {
        "name": run.name,
        "digest": digest,
        "tokens": steps * tokens_a_step,
        "steps": steps,
        "val_loss": curve.final_val_loss,
        "val_loss_full_precision": plain,
        "train_loss": curve.final_train_loss,
        "extra_mmas": None if monitor is None else extra_mmas(module, monitor),
        "tokens_per_second": curve.tokens_per_second,
        "seconds": time.perf_counter() - began,
        "device": torch.cuda.get_device_name() if on_gpu else "CPU",
        "curve": {"train_loss": curve.train_loss, "val_loss": curve.val_loss},
    }
    if run.keep_weights:
        # At once, since runs that start from it wait for the file.
        whole = folder / ".weights.partial"
        torch.save({name: value.cpu() for name, value in module.state_dict().items()}, whole)
        whole.replace(folder / WEIGHTS)
    # Last, since its presence says that the run is complete.
    partial = folder / ".result.partial"
    partial.write_text(json.dumps(result))
    partial.replace(folder / "result.json")
    checkpoint.unlink(missing_ok=True)
    return result


def _validate_in_full_precision(
    trained: L.LightningModule,
    plain: L.LightningModule,
    data: StudyData,
    shared: dict[str, Any],
    precision: OuterPrecision,
) -> float:
    """Held-out loss of the weights of ``trained`` without quantization: what training with it has done to them."""
    state = {name: value for name, value in trained.state_dict().items() if name in plain.state_dict()}
    plain.load_state_dict(state)
    trainer = L.Trainer(
        accelerator=shared["accelerator"],
        devices=1,
        precision=precision,
        limit_val_batches=shared["val_batches"],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    return trainer.validate(plain, datamodule=data, verbose=False)[0]["val_loss"]


def extra_mmas(module: L.LightningModule, monitor: FallbackRateMonitor) -> float:
    """MMAs of fallback blocks over those of the products themselves, for all GEMMs of the run together.

    A layer that reads its sibling's planes has no rate of its own for X and repeats the sibling's blocks. Blocks where
    both operands of a wgrad have fallen back are counted as if the two were independent.
    """
    rates = dict(zip(monitor.labels, monitor.rates.nanmean(0).tolist(), strict=True))
    plain = extra = x = 0.0
    for name, child in module.named_modules():
        if not isinstance(child, Int8Linear):
            continue
        own = rates.get((name, "x"), 0.0)
        x = x if math.isnan(own) else own
        dgrad, wgrad = (
            rates.get((name, operand), rates.get((name, "dy"), 0.0)) for operand in ("dy_dgrad", "dy_wgrad")
        )
        # The input of the first layer may need no gradient.
        dgrad, wgrad = (0.0 if math.isnan(rate) else rate for rate in (dgrad, wgrad))
        in_wgrad = 0.0 if child.int8_recipe.mixes else x
        both = in_wgrad * wgrad if child.int8_recipe.scaling == "row" else 0.0
        plain += 3 * child.in_features * child.out_features
        extra += child.in_features * child.out_features * (x + in_wgrad + dgrad + wgrad + both)
    return extra / plain


def _check_digest(folder: Path, digest: str) -> None:
    file = folder / "digest"
    if file.exists() and file.read_text() != digest:
        raise ValueError(
            f"{folder} holds a run of another configuration. Delete it, or write to another folder with --output."
        )
    file.write_text(digest)


def _module(run: Run, shared: dict[str, Any], steps: int, on_gpu: bool) -> LlamaModule:
    model = shared["model"]
    config = {**model["config"], **run.model}
    return StudyModule(
        objective=run.objective,
        seed=run.seed,
        compile=(run.compile or model["compile"]) if on_gpu else None,
        config=config,  # type: ignore[arg-type]
        learning_rate=model["learning_rate"] if run.learning_rate is None else run.learning_rate,
        warmup_steps=max(1, min(model["warmup_steps"], steps // 10)),
    )
