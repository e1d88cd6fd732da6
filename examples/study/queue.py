"""The study's runs side by side: one process a run, one run a device at a time, in the order of their priority."""

from __future__ import annotations

import fcntl
import json
import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TextIO

# Imports, compilation and evaluation of a run, in seconds, beside its training.
OVERHEAD = 40.0
# A run that has not ended this many seconds after the time limit hangs, and is ended.
GRACE = 60.0
# Written by a run that has stopped at the time limit: the share of its steps that its checkpoint holds.
STOPPED = "stopped"


@dataclass(frozen=True)
class Job:
    """One run to train.

    Args:
        name: Its YAML's name.
        plan: The YAML.
        shared: What all runs of its length share: the study's YAML with the command line's changes.
        study: Folder of the runs of its length.
        start: The file of another run that it starts from.
        tokens: How many it trains on.
        kind: What runs of the same speed have in common.
    """

    name: str
    plan: Path
    shared: dict[str, Any]
    study: Path
    start: Path | None
    tokens: int
    kind: str

    @property
    def folder(self) -> Path:
        """Where it leaves its checkpoint, its log and its results."""
        return self.study / self.name

    @property
    def ready(self) -> bool:
        """Whether what it starts from is there."""
        return self.start is None or self.start.exists()

    @property
    def share_done(self) -> float:
        """How much of it an earlier call has done before its time was over, from 0 to 1."""
        file = self.folder / STOPPED
        return float(file.read_text()) if file.exists() else 0.0

    @property
    def result(self) -> dict[str, Any] | None:
        """What it left when it was done."""
        file = self.folder / "result.json"
        return json.loads(file.read_text()) if file.exists() else None


def start_server() -> None:
    """Starts the process that the runs are forked from, and returns while it still imports what they need.

    It never touches a GPU: a run starts at once, and its crash is its own.
    """
    forkserver.set_forkserver_preload(["examples.study.train"])
    forkserver.ensure_running()


def work_off(
    jobs: Sequence[Job],
    devices: Sequence[str],
    caches: Mapping[str, str],
    stop_at: float,
    report: Callable[[Job, str], None],
    ahead: bool = False,
) -> None:
    """Trains the jobs that have no result yet, and returns when all have ended.

    Several calls, on one host or on several that share the folder, may work off the same jobs: a job that one of them
    has taken is left to it.

    Args:
        jobs: In the order of their priority.
        devices: An entry a process: an index of a GPU, or ``"cpu"``. One that is named twice has two runs at a time.
        caches: Folders of the tokens by corpus, see :func:`examples.study.corpus.prepare`.
        stop_at: `time.time()` at which running jobs save a checkpoint and stop. A job that by the throughput measured
            so far cannot be done by then starts only where no other can.
        report: Called with a job that has ended and ``""`` if it has a result, else why not.
        ahead: Whether each entry of ``devices`` has a second process, whose run gets ready while the first one trains.
    """
    context = multiprocessing.get_context("forkserver")
    waiting = [job for job in jobs if job.result is None]
    turns = tempfile.TemporaryDirectory(prefix="study-turns-")
    free = [(device, Path(turns.name, str(entry)) if ahead else None) for entry, device in enumerate(devices)]
    free *= 2 if ahead else 1
    processes = len(free)
    running: dict[int, tuple[Job, BaseProcess, tuple[str, Path | None], TextIO]] = {}
    # As Ctrl-C does, or the runs would go on without their parent.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        while True:
            while free and time.time() < stop_at and (taken := _take(waiting, jobs, stop_at - time.time())):
                job, lock = taken
                process = context.Process(target=_work, args=(job, *free[0], caches, stop_at, processes))
                process.start()
                running[process.sentinel] = (job, process, free.pop(0), lock)
            if not running:
                return
            left = stop_at + GRACE - time.time()
            ended = wait(list(running), timeout=max(0.0, min(left, 5.0)))
            for sentinel in [*ended, *(running if left <= 0 else ())]:
                if sentinel not in running:
                    continue
                job, ending, device, lock = running.pop(sentinel)
                hung = ending.is_alive() and left <= 0
                if hung:
                    ending.kill()
                ending.join()
                lock.close()
                free.append(device)
                report(job, "ended: it did not stop at the time limit" if hung else _outcome(job, ending.exitcode))
    finally:
        for _, left_over, _, _ in running.values():
            left_over.kill()
        signal.signal(signal.SIGTERM, before)
        turns.cleanup()


def _take(waiting: list[Job], jobs: Sequence[Job], seconds: float) -> tuple[Job, TextIO] | None:
    """Removes the next job that nobody else works on from ``waiting``; ``None`` where there is none now."""
    ready = [job for job in waiting if job.ready]
    for job in sorted(ready, key=lambda job: _seconds_needed(job, jobs) > seconds):
        job.folder.mkdir(parents=True, exist_ok=True)
        lock = open(job.folder / ".lock", "w")  # noqa: SIM115
        try:
            # The kernel gives it back when this process ends, however it ends.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            continue
        waiting.remove(job)
        if job.result is None:
            return job, lock
        lock.close()
    return None


def _seconds_needed(job: Job, jobs: Sequence[Job]) -> float:
    """At least: at the speed of the fastest run that is done of its kind, or of any kind; none when none is."""
    done = [(other, other.result) for other in jobs]
    speeds = [(other.kind, result["tokens_per_second"]) for other, result in done if result is not None]
    # A run of a few steps has no speed (NaN).
    speeds = [(kind, speed) for kind, speed in speeds if speed > 0]
    mine = [speed for kind, speed in speeds if kind == job.kind] or [speed for _, speed in speeds]
    return OVERHEAD + (1.0 - job.share_done) * job.tokens / max(mine) if mine else 0.0


def _outcome(job: Job, exit_code: int | None) -> str:
    if job.result is not None:
        return ""
    if (job.folder / STOPPED).exists():
        return f"stopped at {job.share_done:.0%}; it goes on in the next call"
    lines = (job.folder / "log.txt").read_text(errors="replace").splitlines()
    return f"failed with exit code {exit_code}: {lines[-1] if lines else 'nothing said'}  ({job.folder / 'log.txt'})"


def _work(job: Job, device: str, turns: Path | None, caches: Mapping[str, str], stop_at: float, processes: int) -> None:
    """Trains one job in a process of its own."""
    cores = max(1, len(os.sched_getaffinity(0)) // processes)
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = str(cores)
    if device != "cpu":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[int(device)] if visible else device
    with _output_to(job.folder / "log.txt"):
        import torch

        from examples.study import corpus
        from examples.study.plan import load
        from examples.study.train import OutOfTimeError, train

        torch.set_num_threads(cores)
        for noisy in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*exists and is not empty.*")
        warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated.*")
        corpus.open_caches(caches, job.shared["data"])
        try:
            train(load(job.plan), job.shared, job.folder, job.start, stop_at, turns)
            (job.folder / STOPPED).unlink(missing_ok=True)
        except OutOfTimeError as error:
            (job.folder / STOPPED).write_text(str(error.share_done))
        except Exception as error:
            (job.folder / STOPPED).unlink(missing_ok=True)
            traceback.print_exc()
            raise SystemExit(f"{type(error).__name__}: {error}") from None


@contextmanager
def _output_to(file: Path) -> Iterator[None]:
    """Sends everything this process prints to ``file``, from C++ too."""
    with open(file, "a", buffering=1) as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
        yield
