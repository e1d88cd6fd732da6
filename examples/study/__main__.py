"""The accuracy study in one command: trains every run that is not finished, side by side on several GPUs.

python -m examples.study --devices 4
python -m examples.study --runs bf16-seed0 row bf16-seed0@25e6 jetfire@25e6 --devices 0,1 --seconds 3600

A name in --runs is a YAML of --plans, in the order of priority; `@25e6` gives a run another number of tokens. Results
lie in `runs/study/<tokens>-tokens/` and are written again after each run: losses and curves as CSV, plots, and
`study.md`. After a call that was cut off, by --seconds or otherwise, the same call keeps what is finished and goes on
with the rest at the last checkpoints.
"""

from __future__ import annotations

import argparse
import copy
import fcntl
import json
import math
import os
import time
from pathlib import Path
from typing import Any

# The fork server of the runs must never open a GPU, not even to count them.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

import torch
import yaml
from rich.console import Console

from examples.study.corpus import describe, prepare
from examples.study.plan import PLANS, Run, in_order, load
from examples.study.queue import Job, start_server, work_off
from examples.study.results import write_results
from examples.study.start import starting_file, tokens_to_train
from examples.text import TokenCache
from lightning_int8.arguments import count, positive

SHARED = Path(__file__).parent / "study.yaml"


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", nargs="*", help="NAME or NAME@TOKENS; default: every YAML of --plans")
    parser.add_argument("--plans", type=Path, default=PLANS, help="folder of the runs' YAMLs (%(default)s)")
    parser.add_argument("--shared", type=Path, default=SHARED, help="YAML of what all runs share (%(default)s)")
    parser.add_argument("--tokens", type=count, help="tokens a run, such as 5e6; default: the shared YAML's")
    parser.add_argument("--batch-size", type=positive, help="sequences a step; default: the shared YAML's")
    parser.add_argument("--max-bytes", type=count, help="text to take of each corpus; default: the shared YAML's")
    parser.add_argument("--accelerator", choices=["auto", "cpu"], help="default: the shared YAML's")
    parser.add_argument(
        "--devices",
        default="1",
        help="how many GPUs (on a CPU, processes) to use, or which: '0,2', or '1,' for GPU 1 alone; a GPU named "
        "twice has two runs at a time (%(default)s)",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=math.inf,
        help="stop after this time: running runs save a checkpoint; those that would not end in time start last",
    )
    parser.add_argument(
        "--ahead",
        action="store_true",
        help="let the next run of each device load and compile while one trains there; needs memory for both",
    )
    parser.add_argument("--output", type=Path, default=Path("runs/study"), help="folder of the results (%(default)s)")
    arguments = parser.parse_args(argv)
    if not arguments.plans.is_dir():
        parser.error(f"--plans={arguments.plans} is not a folder.")
    known = sorted(path.stem for path in arguments.plans.glob("*.yaml"))
    arguments.runs = arguments.runs or known
    try:
        arguments.runs = [_parse_run(text, known) for text in arguments.runs]
    except ValueError as error:
        parser.error(str(error))
    return arguments


def _parse_run(text: str, known: list[str]) -> tuple[str, int | None]:
    name, _, tokens = text.partition("@")
    if name not in known:
        raise ValueError(f"--runs: {name} not among {', '.join(known)}.")
    try:
        return name, count(tokens) if tokens else None
    except argparse.ArgumentTypeError:
        raise ValueError(f"--runs {text}: after the @ a number of tokens of at least 1, such as 25e6.") from None


def _devices(text: str, accelerator: str) -> list[str]:
    on_gpu = accelerator != "cpu" and torch.cuda.is_available()
    most = torch.cuda.device_count() if on_gpu else os.cpu_count() or 1
    try:
        devices = [int(part) for part in text.split(",") if part] if "," in text else list(range(int(text)))
    except ValueError:
        raise SystemExit(f"--devices {text}: a number of devices, or their indices such as 0,2.") from None
    if not devices or min(devices) < 0 or max(devices) >= most:
        raise SystemExit(f"--devices {text}: this machine has {most} {'GPU(s)' if on_gpu else 'core(s)'}.")
    return [str(device) if on_gpu else "cpu" for device in devices]


def main(argv: list[str] | None = None) -> list[Path]:
    """Runs the study and returns the folders of its results, one for each number of tokens."""
    began = time.time()
    arguments = parse_arguments(argv)
    console = Console(width=160, highlight=False)

    def say(text: str) -> None:
        console.print(f"[{time.time() - began:6.0f} s] {text}", markup=False)

    by_study = _studies(arguments)
    runs = [run for _, members in by_study.values() for run in members.values()]
    shared = next(iter(by_study.values()))[0]
    devices = _devices(arguments.devices, shared["accelerator"])
    start_server()
    caches = prepare((run.corpus for run in runs), shared["data"])
    for corpus, folder in caches.items():
        say(f"{corpus}: {describe(TokenCache(Path(folder)))}")
    jobs = {
        (study, run.name): Job(
            run.name,
            arguments.plans / f"{run.name}.yaml",
            shared,
            study,
            starting_file(run, study),
            tokens_to_train(run, shared),
            run.kind,
        )
        for study, (shared, members) in by_study.items()
        for run in members.values()
    }
    order = [jobs[_study(arguments, tokens), name] for name, tokens in arguments.runs]

    def write(study: Path) -> None:
        # All that lie there: other calls may have trained some of them.
        plans = [
            plan for plan in sorted(arguments.plans.glob("*.yaml")) if (study / plan.stem / "result.json").exists()
        ]
        finished = [(load(plan), json.loads((study / plan.stem / "result.json").read_text())) for plan in plans]
        if finished:
            # One writer at a time: other calls write the same tables.
            with open(study / ".lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                write_results(study, finished, by_study[study][0])

    def report(job: Job, problem: str) -> None:
        result = job.result
        if result is None:
            say(f"{job.name}@{job.tokens}  {problem}")
            return
        say(
            f"{job.name}@{job.tokens}  held-out {result['val_loss']:.4f}  train {result['train_loss']:.4f}  "
            f"{result['tokens_per_second']:,.0f} tokens/s  {result['steps']} steps  {result['seconds']:.0f} s"
        )
        write(job.study)

    work_off(order, devices, caches, began + arguments.seconds, report, arguments.ahead)
    for study in by_study:
        write(study)
        if study.is_dir():
            say(f"{study}: " + "  ".join(sorted(path.name for path in study.iterdir() if path.is_file())))
    left = [f"{job.name}@{job.tokens}" for job in order if job.result is None]
    say(f"{len(order) - len(left)} of {len(order)} runs are done" + (f"; not: {', '.join(left)}" if left else ""))
    return list(by_study)


def _study(arguments: argparse.Namespace, tokens: int | None) -> Path:
    return arguments.output / f"{tokens or int(arguments.tokens)}-tokens"


def _studies(arguments: argparse.Namespace) -> dict[Path, tuple[dict[str, Any], dict[str, Run]]]:
    """What the runs share, and the runs by name, for each number of tokens."""
    shared = yaml.safe_load(arguments.shared.read_text())
    for group, key, value in (
        (shared, "tokens", arguments.tokens),
        (shared, "accelerator", arguments.accelerator),
        (shared["data"], "batch_size", arguments.batch_size),
        (shared["data"], "max_bytes", arguments.max_bytes),
    ):
        if value is not None:
            group[key] = value
    arguments.tokens = shared["tokens"]
    studies: dict[Path, tuple[dict[str, Any], dict[str, Run]]] = {}
    for name, tokens in arguments.runs:
        mine = copy.deepcopy(shared) | {"tokens": tokens or shared["tokens"]}
        _, members = studies.setdefault(_study(arguments, tokens), (mine, {}))
        members[name] = load(arguments.plans / f"{name}.yaml")
    for _, members in studies.values():
        in_order(list(members.values()))
    return studies


if __name__ == "__main__":
    main()
