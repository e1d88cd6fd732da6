"""How the benchmark times: interleaved rounds on a full queue, medians, a copy's bandwidth, kernels by name."""

from __future__ import annotations

import itertools
import math
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch

Run = Callable[[], object]

# Cycles that the GPU waits before a round while the host fills its queue: about 20 ms at 2 GHz, where an INT8 linear
# takes the host 2 ms.
_HEAD_START = 40_000_000
# GEMM kernels of cuBLAS, CUTLASS, Triton and this package. Hopper's cuBLAS encodes its types: nvjet_sm90_qqtst reads
# FP8 (q), nvjet_sm90_tst BF16.
_OURS = r"^(_gemm_)?(row|block)\w*_kernel"
_GEMM = re.compile(rf"gemm|nvjet|cutlass|xmma|_mm_kernel|triton_tem|{_OURS}", re.IGNORECASE)
_LOW_PRECISION = re.compile(
    rf"nvjet_sm\d+_[qoy]|e4m3|e5m2|_f8|fp8|float8|_s8_|int8|_i8|imma|igemm|{_OURS}", re.IGNORECASE
)


class Clock:
    """How much of the time that the user grants is spent.

    Args:
        seconds: All of it.
    """

    def __init__(self, seconds: float) -> None:
        self._begin, self.seconds, self._from = time.monotonic(), seconds, 0.0

    @property
    def spent(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._begin

    def divide_rest(self) -> None:
        """From now on fractions are of the time that is left."""
        self._from = min(self.spent, self.seconds)

    def before(self, fraction: float, expected: float = 0.0) -> bool:
        """Whether something that takes ``expected`` seconds ends before this fraction of the time is spent."""
        return self.spent + expected < self._from + fraction * (self.seconds - self._from)


def interleaved(runs: Mapping[str, Run], device: torch.device, rounds: int = 10, warmup: int = 2) -> dict[str, float]:
    """Median milliseconds of each run.

    Each round runs all of them once, so that clock, power and memory are alike for all.

    Args:
        runs: What to time, by name.
        device: Where they run. On a GPU its own time is taken, from the start of a run's work to the end.
        rounds: How often.
        warmup: Rounds before those. In each the GPU waits until the host has filled its queue.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(warmup + rounds):
        pairs = []
        _head_start(device)
        for name, run in runs.items():
            begin = _mark(device)
            run()
            pairs.append((name, begin, _mark(device)))
        _synchronize(device)
        if index >= warmup:
            for name, begin, end in pairs:
                times[name].append(_milliseconds(begin, end))
    return {name: statistics.median(values) for name, values in times.items()}


def in_a_row(run: Run, device: torch.device, rounds: int, warmup: int) -> float:
    """Median milliseconds of runs that follow one another, as in a training loop.

    What the host takes longer than the GPU shows. ``warmup``: how many are run before those.
    """
    for _ in range(warmup):
        run()
    marks = [_mark(device)]
    for _ in range(rounds):
        run()
        marks.append(_mark(device))
    _synchronize(device)
    return statistics.median(_milliseconds(begin, end) for begin, end in itertools.pairwise(marks))


def _head_start(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda._sleep(_HEAD_START)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _mark(device: torch.device) -> Any:
    if device.type == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _milliseconds(begin: Any, end: Any) -> float:
    return (end - begin) * 1e3 if isinstance(begin, float) else begin.elapsed_time(end)


def seconds(run: Run, device: torch.device) -> float:
    """Of one run as the user waits for it, compilation included."""
    _synchronize(device)
    begin = time.perf_counter()
    run()
    _synchronize(device)
    return time.perf_counter() - begin


def copy_bandwidth(device: torch.device, bytes_each_way: int = 1 << 28) -> float:
    """Bytes a second, read and written, of a copy within the device's memory."""
    source = torch.empty(bytes_each_way, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    milliseconds = interleaved({"copy": lambda: target.copy_(source)}, device)["copy"]
    return 2 * bytes_each_way / milliseconds * 1e3


def kernel_times(run: Run, device: torch.device) -> dict[str, float]:
    """Milliseconds of GPU time in one run by kernel name, largest first; empty off a GPU."""
    if device.type != "cuda":
        return {}
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profiler:
        run()
        torch.cuda.synchronize()
    times: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        if event.self_device_time_total:
            times[event.key] += event.self_device_time_total / 1e3
    return dict(sorted(times.items(), key=lambda item: -item[1]))


def low_precision_share(kernels: Mapping[str, float]) -> float:
    """Share of the GEMM kernels' time that is spent in 8 bits, by their names; NaN where no kernel is a GEMM."""
    gemms = {name: time for name, time in kernels.items() if _GEMM.search(name)}
    low = sum(time for name, time in gemms.items() if _LOW_PRECISION.search(name))
    return low / sum(gemms.values()) if gemms else math.nan
