"""Times what the host does for a linear layer, forward and backward, without waiting for the GPU.

``python -m benchmarks.host_time [--tokens 256] [--features 512] [--repeats 20] [--recipe row] [--profile]``

Microseconds of one linear, the least of several repeats. Sizes are small, so that a GPU is never what is waited for.
Where there is no GPU, the kernels of Hopper are prepared on CPU tensors and launching is a call that does nothing:
what Triton's launcher and CUDA's allocator take is missing there.
"""

from __future__ import annotations

import argparse
import cProfile
import importlib
import pkgutil
import pstats
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_int8 import FallbackState, int8_linear, kernels, resolve_recipe
from lightning_int8.kernels import backends
from lightning_int8.kernels.launch import CachedLaunch

WARMUP, CALLS = 10, 50


class Nothing:
    """Stands for a kernel and for what it compiles to: its launches do nothing."""

    function, packed_metadata = 0, (4, 1, 0)

    def __init__(self, kernel: Any) -> None:
        self.arg_names, self.constexprs, self.__name__ = kernel.arg_names, kernel.constexprs, kernel.__name__

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Nothing]:
        return self.run

    def run(self, *args: Any, **constants: Any) -> Nothing:
        """Launches nothing."""
        return self


def without_a_gpu() -> None:
    """Makes this process run Hopper's backend on CPU tensors, for all but what is launched."""
    from lightning_int8.kernels import hopper

    for found in pkgutil.iter_modules(kernels.__path__, f"{kernels.__name__}."):
        for value in vars(importlib.import_module(found.name)).values():
            if isinstance(value, CachedLaunch) and not isinstance(value.kernel, Nothing):
                value.kernel = Nothing(value.kernel)
    hopper._processors = lambda index: 132  # type: ignore[assignment]
    backends.choose = lambda backend, device, block=None: "hopper"


def linear_step(recipe: str | None, tokens: int, features: int, device: str) -> Callable[[], None]:
    """One forward and backward of a linear under autocast, as ``bf16-mixed`` training does; ``None``: ``F.linear``."""
    x = torch.randn(tokens, features, dtype=torch.bfloat16, device=device, requires_grad=True)
    weight = torch.randn(features, features, device=device, requires_grad=True)
    dy = torch.randn(tokens, features, dtype=torch.bfloat16, device=device)
    resolved = None if recipe is None else resolve_recipe(recipe)
    state = None if resolved is None else FallbackState(resolved)

    def linear() -> Tensor:
        if resolved is None:
            return F.linear(x, weight)
        return int8_linear(x, weight, recipe=resolved, state=state)

    def step() -> None:
        x.grad = weight.grad = None
        with torch.autocast(device, torch.bfloat16):
            y = linear()
        y.backward(dy)

    return step


def microseconds(step: Callable[[], None], repeats: int) -> float:
    """Of one call on the host; the least of ``repeats`` means over ``CALLS`` calls."""
    for _ in range(WARMUP):
        step()
    return min(_mean(step) for _ in range(repeats))


def _mean(step: Callable[[], None]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    # Without a GPU all is one thread's work, which its own time says better than the clock of a busy machine.
    clock = time.perf_counter if torch.cuda.is_available() else time.thread_time
    start = clock()
    for _ in range(CALLS):
        step()
    return (clock() - start) * 1e6 / CALLS


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Measures and prints; returns microseconds by precision."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--features", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--recipe", default="row")
    parser.add_argument("--profile", action="store_true", help="print in which functions the time goes")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(1)
        without_a_gpu()
    found = {}
    # BF16 would compute on a CPU.
    names = [options.recipe] if device == "cpu" else ["bf16", options.recipe]
    for name in names:
        step = linear_step(None if name == "bf16" else name, options.tokens, options.features, device)
        found[name] = microseconds(step, options.repeats)
        print(f"{name}: {found[name]:.0f} µs a linear, forward and backward, on the host of a {device}", flush=True)
    if options.profile:
        profile = cProfile.Profile()
        # The backward in this thread, which is the one that is profiled.
        with torch.autograd.set_multithreading_enabled(False):
            profile.runcall(lambda: [step() for _ in range(CALLS)])
        pstats.Stats(profile).sort_stats("tottime").print_stats(30)
    return found


if __name__ == "__main__":
    main()
