"""One run of the benchmark: what of the command line is measured in the time it grants, model after model."""

from __future__ import annotations

import argparse
import datetime
import gc
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from rich.progress import Progress

from lightning_int8.bench import first_step, gemm, linear, step
from lightning_int8.bench.advice import linear_advice, step_advice
from lightning_int8.bench.precisions import Precision, installed_peers, precisions, versions
from lightning_int8.bench.roofline import peak_of
from lightning_int8.bench.timing import Clock, copy_bandwidth
from lightning_int8.bench.workload import load
from lightning_int8.kernels import backends
from lightning_int8.recipe import PRESETS

# In-features and out-features of the linears of a 1B and an 8B Llama, and smaller.
LINEARS = ((4096, 4096), (2048, 2048), (4096, 14336), (14336, 4096), (2048, 8192), (8192, 2048), (1024, 1024),
           (4096, 1024), (3072, 3072), (1536, 1536))  # fmt: skip
DEFAULTS = (PRESETS["row"], PRESETS["block"])

T = TypeVar("T")


class Run:
    """Measures model after model, each shape once, and keeps the results.

    Args:
        args: The parsed command line.
        gpu: The device's name.
        bar: Shows how far it is.
    """

    def __init__(self, args: argparse.Namespace, gpu: str, bar: Progress) -> None:
        self.args, self.gpu, self.bar = args, gpu, bar
        self.clock, self.device = Clock(args.seconds), torch.device(args.device)
        self.peak, self.bandwidth = peak_of(gpu), copy_bandwidth(self.device)
        self.peers = installed_peers() if args.peers is None else args.peers
        self.measured: dict[str, list[dict[str, Any]]] = {"gemm": [], "linear": [], "step": [], "first_step": []}
        self.skipped: list[str] = []
        self.names: dict[tuple[int, int], list[str]] = {}
        self.recipes: dict[str, None] = {}
        if self.peak is None:
            self.skipped.append(f"the modelled roofline: peak rates of {gpu} are not in the table")

    def measure(self, config: str | None, until: Mapping[str, float]) -> None:
        """Measures the sections in ``until`` for a model, or for the linears of Llamas.

        Args:
            config: See :func:`lightning_int8.bench.workload.load`.
            until: By which fraction of the time each section begins its last measurement.
        """
        workload = load(config, self.args.tokens, self.device) if config else None
        recipes = self.args.recipes or ([workload.recipe] if workload and workload.recipe else DEFAULTS)
        compared = precisions(recipes, self.peers)
        ours = [precision for precision in compared if precision.recipe is not None]
        self.recipes |= dict.fromkeys(precision.name for precision in ours)
        tokens = workload.tokens if workload else self.args.tokens
        shapes = self.args.shapes or list(LINEARS)
        if workload:
            for key, layers in workload.shapes.items():
                self.names.setdefault(key, []).extend(layers)
            shapes = self.args.shapes or list(workload.shapes)
        if "gemm" in until:
            self._gemms(shapes, tokens, ours, until["gemm"])
        if "linear" in until:
            self._linears(shapes, tokens, compared, until["linear"])
        if workload is None:
            if "step" in until or "first-step" in until:
                self.skipped.append("the training step and the first step: name a model with --config")
            return
        if "step" in until:
            task = self.bar.add_task(f"step of {workload.name}", total=None)
            say = lambda text: self.bar.update(task, description=text)  # noqa: E731
            least = workload.min_features if self.args.min_features is None else self.args.min_features
            trained = precisions(recipes, self.peers, least)
            line = step.measure(workload, trained, self.args.compile, self.clock, until["step"], report=say)
            self.measured["step"].append({**line, "min_features": least})
            self.bar.update(task, total=1, completed=1, description=f"step of {workload.name}")
        if "first-step" in until:
            name = workload.name
            # The next processes need its memory.
            del workload
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            for _ in self._in_time("first step", [name], until["first-step"]):
                found = first_step.measure(str(config), recipes[0], tokens, self.device)
                self.measured["first_step"].append({"model": name, "recipe": ours[0].name, **found})

    def _in_time(self, what: str, items: Sequence[T], until: float) -> Iterator[T]:
        """Those of ``items`` for which there is time; says from which on there was none."""
        left = list(items)
        task = self.bar.add_task(f"{what}s", total=len(left))
        while left and self.clock.before(until):
            yield left.pop(0)
            self.bar.advance(task)
        if left:
            rest = f", {len(left)} of {len(items)}" if len(items) > 1 else ""
            first = " ".join(map(str, left[0])) if isinstance(left[0], tuple) else left[0]
            self.skipped.append(f"{what} from {first} on{rest}: out of time (--seconds {self.args.seconds:g})")

    def _gemms(self, shapes: list[tuple[int, int]], tokens: int, ours: list[Precision], until: float) -> None:
        backend = backends.choose("auto", self.device)
        scalings = list(dict.fromkeys(p.recipe.scaling for p in ours if p.recipe and p.recipe.scaling != "vector"))
        known = {(line["product"], line["k"], line["n"]) for line in self.measured["gemm"] if line["tokens"] == tokens}
        lines = [(product, k, n) for k, n in shapes for product in ("forward", "dgrad", "wgrad")]
        for product, k, n in self._in_time("GEMM", [line for line in lines if line not in known], until):
            line = gemm.measure(
                product, tokens, k, n, scalings, (0.0, 0.2), gemm.peers(self.device), backend, self.device,
                self.peak, self.bandwidth,
            )  # fmt: skip
            self.measured["gemm"].append(line)

    def _linears(self, shapes: list[tuple[int, int]], tokens: int, compared: list[Precision], until: float) -> None:
        known = {(line["k"], line["n"]) for line in self.measured["linear"] if line["tokens"] == tokens}
        for k, n in self._in_time("linear", [shape for shape in shapes if shape not in known], until):
            line = linear.measure(tokens, k, n, compared, self.device, self.peak, self.bandwidth)
            self.measured["linear"].append(line)

    def results(self, command: str) -> dict[str, Any]:
        """All that was measured, as JSON holds it."""
        return {
            "about": {
                "device": self.gpu, "date": datetime.date.today().isoformat(), "versions": versions(),
                "seconds": self.clock.spent, "copy_bandwidth": self.bandwidth, "command": command,
            },
            **self.measured,
            "advice": [
                *linear_advice(self.measured["linear"], list(self.recipes), self.names),
                *step_advice(self.measured["step"], list(self.recipes)),
            ],
            "skipped": self.skipped,
        }  # fmt: skip
