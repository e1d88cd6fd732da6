"""One run of the benchmark: what of the command line is measured in the time it grants, model after model."""

from __future__ import annotations

import argparse
import datetime
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from rich.progress import Progress

from lightning_int8.bench import ahead, first_step, gemm, linear, step
from lightning_int8.bench.advice import linear_advice, step_advice
from lightning_int8.bench.precisions import Precision, installed_peers, precisions, versions
from lightning_int8.bench.roofline import peak_of
from lightning_int8.bench.timing import Clock, copy_bandwidth
from lightning_int8.bench.workload import Workload, load
from lightning_int8.kernels import backends
from lightning_int8.kernels.compile_ahead import noted, side_by_side
from lightning_int8.recipe import PRESETS, Int8Recipe
from lightning_int8.small_layers import MinFeatures

# In-features and out-features of the linears of a 1B and an 8B Llama, and smaller.
LINEARS = ((4096, 4096), (2048, 2048), (4096, 14336), (14336, 4096), (2048, 8192), (8192, 2048), (1024, 1024),
           (4096, 1024), (3072, 3072), (1536, 1536))  # fmt: skip
DEFAULTS = (PRESETS["row"], PRESETS["block"])
# The share of the time after which compiling ahead is stopped.
COMPILING_ENDS = 0.45

T = TypeVar("T")


class Plan(NamedTuple):
    """What is measured for a model, or for the linears of Llamas: it follows from the command line and the model."""

    recipes: Sequence[Int8Recipe]
    tokens: int
    shapes: list[tuple[int, int]]
    min_features: MinFeatures
    # BF16, the first recipe, the peers, the other recipes: what is left out for time is the last.
    trained: list[ahead.Named]


class Run:
    """Measures model after model, each shape once, and keeps the results.

    Args:
        args: The parsed command line.
        gpu: The device's name.
        bar: Shows how far it is.
    """

    def __init__(
        self, args: argparse.Namespace, gpu: str, bar: Progress, save: Callable[[Mapping[str, Any]], object]
    ) -> None:
        self.args, self.gpu, self.bar, self.save = args, gpu, bar, save
        self.clock, self.device = Clock(args.seconds), torch.device(args.device)
        self.peak, self.bandwidth = peak_of(gpu), copy_bandwidth(self.device)
        self.peers = installed_peers() if args.peers is None else args.peers
        self.measured: dict[str, list[dict[str, Any]]] = {"gemm": [], "linear": [], "step": [], "first_step": []}
        self.skipped: list[str] = []
        self.names: dict[tuple[int, int], list[str]] = {}
        self.recipes: dict[str, None] = {}
        self.compiled: dict[str, Any] = {}
        if self.peak is None:
            self.skipped.append(f"the modelled roofline: peak rates of {gpu} are not in the table")

    def _plan(self, workload: Workload | None) -> Plan:
        recipes = self.args.recipes or ([workload.recipe] if workload and workload.recipe else DEFAULTS)
        shapes = self.args.shapes or list(workload.shapes if workload else LINEARS)
        least = self.args.min_features
        if least is None:
            least = workload.min_features if workload else 0
        ours = [ahead.Named(recipe, None, least) for recipe in recipes]
        peers = [ahead.Named(None, name) for name in self.peers]
        trained = [ahead.Named(None, None), *ours[:1], *peers, *ours[1:]]
        return Plan(recipes, workload.tokens if workload else self.args.tokens, shapes, least, trained)

    def compile_ahead(self, configs: Sequence[str | None], sections: Sequence[str]) -> None:
        """Compiles side by side what will be measured, so that the GPU does not wait for one compilation at a time.

        Args:
            configs: As :meth:`measure` will be given them.
            sections: What it will measure of each.
        """
        if not self.args.compile_workers:
            return
        begin = time.monotonic()
        task = self.bar.add_task("compiling: what there is to compile", total=None)
        errors: list[str] = []
        others: list[ahead.Layer | ahead.PeerLinear] = []

        def work() -> None:
            for config in configs:
                # A model that cannot run without values is compiled where it is measured.
                try:
                    others.extend(self._jobs(config, sections))
                except Exception as error:
                    errors.append(f"{config}: {type(error).__name__}: {str(error)[:200]}")

        kernels = noted(work)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        # Layers take longest, and those that launch our kernels find them compiled.
        layers = [job for job in others if isinstance(job, ahead.Layer)]
        first = [layer for layer in layers if layer.precision.recipe is None]
        every: tuple[Callable[[], None], ...] = (*first, *kernels, *layers, *others)
        jobs = list(dict.fromkeys(every))
        workers = self.args.compile_workers
        self.bar.update(task, total=len(jobs), description=f"compiling, {workers} side by side")
        ended = 0
        for index, failure in side_by_side(jobs, workers, COMPILING_ENDS * self.clock.seconds - self.clock.spent):
            ended += 1
            self.bar.advance(task)
            if failure:
                errors.append(f"{jobs[index]}: {failure}")
        self.compiled = {"jobs": len(jobs), "ended": ended, "seconds": time.monotonic() - begin, "errors": errors}
        self.clock.divide_rest()

    def _jobs(self, config: str | None, sections: Sequence[str]) -> Iterator[ahead.Layer | ahead.PeerLinear]:
        """What is to be compiled besides this package's kernels; all of those are launched on the way."""
        workload = load(config, self.args.tokens, ahead.META) if config else None
        plan = self._plan(workload)
        ours = precisions(plan.recipes, [])[1:]
        if "gemm" in sections:
            ahead.run_gemms(plan.shapes, plan.tokens, plan.recipes, self.device)
        if "linear" in sections:
            ahead.run_linears(plan.shapes, plan.tokens, ours, self.device)
            for peer in self.peers:
                yield from (ahead.PeerLinear(plan.tokens, *shape, peer, self.device) for shape in plan.shapes)
        if config and workload and "step" in sections and step.repeated_layers(workload.model):
            for named in plan.trained:
                if self.args.compile != "none":
                    yield ahead.Layer(config, self.args.tokens, named, self.args.compile, self.device)
                if named.recipe is not None:
                    ahead.layer_pass(workload, named.made(), None, self.device)()

    def measure(self, config: str | None, until: Mapping[str, float]) -> None:
        """Measures the sections in ``until`` for a model, or for the linears of Llamas.

        Args:
            config: See :func:`lightning_int8.bench.workload.load`.
            until: By which fraction of the time each section begins its last measurement.
        """
        workload = load(config, self.args.tokens, self.device) if config else None
        plan = self._plan(workload)
        compared = precisions(plan.recipes, self.peers)
        ours = [precision for precision in compared if precision.recipe is not None]
        self.recipes |= dict.fromkeys(precision.name for precision in ours)
        if workload:
            for key, layers in workload.shapes.items():
                self.names.setdefault(key, []).extend(layers)
        if "gemm" in until:
            self._gemms(plan, until["gemm"])
            self.save(self.results())
        if "linear" in until:
            self._linears(plan, compared, until["linear"])
            self.save(self.results())
        if workload is None:
            if "step" in until or "first-step" in until:
                self.skipped.append("the training step and the first step: name a model with --config")
        elif "step" in until:
            task = self.bar.add_task(f"step of {workload.name}", total=None)
            say = lambda text: self.bar.update(task, description=text)  # noqa: E731
            trained = [named.made() for named in plan.trained]
            line = step.measure(workload, trained, self.args.compile, self.clock, until["step"], report=say)
            self.measured["step"].append({**line, "min_features": plan.min_features})
            self.bar.update(task, total=1, completed=1, description=f"step of {workload.name}")
            self.save(self.results())

    def first_step(self, config: str, until: float) -> None:
        """Measures the first step of fresh processes, if there is time; nothing else may be in the GPU's memory."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        workload = load(config, self.args.tokens, ahead.META)
        recipe = self._plan(workload).recipes[0]
        for _ in self._in_time("first step", [workload.name], until):
            rest = self.clock.seconds - self.clock.spent
            found = first_step.measure(config, recipe, self.args.tokens, self.device, rest)
            self.measured["first_step"].append({"model": workload.name, "recipe": recipe.describe(), **found})

    def _in_time(self, what: str, items: Sequence[T], until: float) -> Iterator[T]:
        """Those of ``items`` for which there is time; says from which on there was none."""
        left = list(items)
        task = self.bar.add_task(f"{what}s", total=len(left))
        durations: list[float] = []
        # The first also loads what all of them need.
        while left and self.clock.before(until, max(durations[1:], default=0.0)):
            begin = time.monotonic()
            yield left.pop(0)
            durations.append(time.monotonic() - begin)
            self.bar.advance(task)
        if left:
            rest = f", {len(left)} of {len(items)}" if len(items) > 1 else ""
            first = " ".join(map(str, left[0])) if isinstance(left[0], tuple) else left[0]
            self.skipped.append(f"{what} from {first} on{rest}: out of time (--seconds {self.args.seconds:g})")

    def _gemms(self, plan: Plan, until: float) -> None:
        tokens = plan.tokens
        backend = backends.choose("auto", self.device)
        known = {(line["product"], line["k"], line["n"]) for line in self.measured["gemm"] if line["tokens"] == tokens}
        lines = [(product, k, n) for k, n in plan.shapes for product in ("forward", "dgrad", "wgrad")]
        for product, k, n in self._in_time("GEMM", [line for line in lines if line not in known], until):
            line = gemm.measure(
                product, tokens, k, n, gemm.timed(product, plan.recipes), gemm.peers(self.device), backend, self.device,
                self.peak, self.bandwidth,
            )  # fmt: skip
            self.measured["gemm"].append(line)

    def _linears(self, plan: Plan, compared: list[Precision], until: float) -> None:
        known = {(line["k"], line["n"]) for line in self.measured["linear"] if line["tokens"] == plan.tokens}
        for k, n in self._in_time("linear", [shape for shape in plan.shapes if shape not in known], until):
            line = linear.measure(plan.tokens, k, n, compared, self.device, self.peak, self.bandwidth)
            self.measured["linear"].append(line)

    def results(self) -> dict[str, Any]:
        """All that was measured, as JSON holds it."""
        return {
            "about": {
                "device": self.gpu, "date": datetime.date.today().isoformat(), "versions": versions(),
                "seconds": self.clock.spent, "copy_bandwidth": self.bandwidth,
                "compiled_ahead": self.compiled,
            },
            **self.measured,
            "advice": [
                *linear_advice(self.measured["linear"], list(self.recipes), self.names),
                *step_advice(self.measured["step"], list(self.recipes)),
            ],
            "skipped": self.skipped,
        }  # fmt: skip
