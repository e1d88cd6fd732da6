"""The accuracy study in one command, resumable: every run that is not finished is trained or continued.

python -m examples.study --tokens 5e6
python -m examples.study --runs bf16-seed0 row block --seconds 120

Results lie in `runs/study/`: curves and final losses as CSV, plots, and `study.md`.
"""

from __future__ import annotations

import argparse
import gc
import logging
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console

from examples.study.plan import PLANS, Run, in_order, load
from examples.study.results import write_results
from examples.study.train import train

SHARED = Path(__file__).parent / "study.yaml"


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", nargs="*", help="names of the runs, in order; default: every YAML of --plans")
    parser.add_argument("--plans", type=Path, default=PLANS, help="folder of the runs' YAMLs (%(default)s)")
    parser.add_argument("--shared", type=Path, default=SHARED, help="YAML of what all runs share (%(default)s)")
    parser.add_argument("--tokens", type=float, help="tokens a run, such as 5e6; default: the shared YAML's")
    parser.add_argument("--batch-size", type=int, help="sequences a step; default: the shared YAML's")
    parser.add_argument("--max-bytes", type=float, help="text to take of each corpus; default: the shared YAML's")
    parser.add_argument("--accelerator", choices=["auto", "cpu"], help="default: the shared YAML's")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no run after this time")
    parser.add_argument("--output", type=Path, default=Path("runs/study"), help="folder of the results (%(default)s)")
    arguments = parser.parse_args(argv)
    if not arguments.plans.is_dir():
        parser.error(f"--plans={arguments.plans} is not a folder.")
    known = sorted(path.stem for path in arguments.plans.glob("*.yaml"))
    unknown = [name for name in arguments.runs or () if name not in known]
    if unknown:
        parser.error(f"--runs: {', '.join(unknown)} not among {', '.join(known)}.")
    arguments.runs = arguments.runs or known
    return arguments


def main(argv: list[str] | None = None) -> Path:
    """Runs the study and returns the folder of its results."""
    began = time.perf_counter()
    arguments = parse_arguments(argv)
    shared = yaml.safe_load(arguments.shared.read_text())
    for key, group, value in (
        ("tokens", shared, arguments.tokens and int(arguments.tokens)),
        ("accelerator", shared, arguments.accelerator),
        ("batch_size", shared["data"], arguments.batch_size),
        ("max_bytes", shared["data"], arguments.max_bytes and int(arguments.max_bytes)),
    ):
        if value is not None:
            group[key] = value
    for noisy in ("lightning.pytorch", "lightning.fabric", "lightning_int8"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*exists and is not empty.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated.*")
    console = Console(width=140)
    folder = arguments.output / f"{shared['tokens']}-tokens"
    finished: list[tuple[Run, dict[str, Any]]] = []
    compiled: tuple[object, ...] = ()
    for run in in_order([load(arguments.plans / f"{name}.yaml") for name in arguments.runs]):
        if time.perf_counter() - began > arguments.seconds:
            console.print(f"{run.name:>22}  not started: --seconds={arguments.seconds:g} are over")
            continue
        # Runs that differ in their seed or text alone run the same programs.
        if compiled != (run.int8, run.float8, run.model, run.objective):
            torch._dynamo.reset()
            compiled = (run.int8, run.float8, run.model, run.objective)
        weights = None if run.init_from is None else folder / run.init_from / "weights.pt"
        if weights is not None and not weights.exists():
            console.print(f"{run.name:>22}  not started: {run.init_from} has left no weights.pt yet")
            continue
        try:
            result = train(run, shared, folder / run.name, weights)
        except Exception as error:
            # One method that cannot run here must not cost the others their results; it has none, and says why.
            console.print_exception(max_frames=4)
            console.print(f"{run.name:>22}  failed: {type(error).__name__}: {error}", markup=False)
            continue
        finally:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        finished.append((run, result))
        console.print(
            f"{run.name:>22}  held-out {result['val_loss']:.4f}  train {result['train_loss']:.4f}  "
            f"{result['tokens_per_second']:>9,.0f} tokens/s  {result['steps']} steps  {result['seconds']:.0f} s"
            f"  (at {time.perf_counter() - began:.0f} s)",
            highlight=False,
        )
    if finished:
        write_results(folder, finished, shared)
        console.print(f"{folder}: " + "  ".join(sorted(path.name for path in folder.iterdir())), highlight=False)
    return folder


if __name__ == "__main__":
    main()
