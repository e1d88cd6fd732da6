"""How the benchmark times: interleaved rounds on a full queue, medians, a copy's bandwidth, kernels by name."""

from __future__ import annotations

import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping

import torch

Run = Callable[[], object]

# Cycles that the GPU waits before a round while the host fills its queue: about 10 ms at 2 GHz.
_HEAD_START = 20_000_000
# GEMM kernels of cuBLAS, CUTLASS, Triton and this package. Hopper's cuBLAS encodes its types: nvjet_sm90_qqtst reads
# FP8 (q), nvjet_sm90_tst BF16.
_GEMM = re.compile(r"gemm|nvjet|cutlass|xmma|_mm_kernel|row_kernel|block_kernel|triton_tem", re.IGNORECASE)
_LOW_PRECISION = re.compile(
    r"nvjet_sm\d+_[qoy]|e4m3|e5m2|_f8|fp8|float8|_s8_|int8|_i8|imma|igemm"
    r"|_gemm_row_kernel|_gemm_block_kernel|^row_kernel|^block_kernel",
    re.IGNORECASE,
)


class Clock:
    """How much of the time that the user grants is spent.

    Args:
        seconds: All of it.
    """

    def __init__(self, seconds: float) -> None:
        self._begin, self.seconds = time.monotonic(), seconds

    @property
    def spent(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._begin

    def before(self, fraction: float) -> bool:
        """Whether less than this fraction is spent: whether something new may begin."""
        return self.spent < fraction * self.seconds


def interleaved(runs: Mapping[str, Run], rounds: int = 10, warmup: int = 2) -> dict[str, float]:
    """Median milliseconds of each run on the GPU.

    Each round runs all of them once, so that clock, power and memory are alike for all. The GPU starts a round when its
    queue is filled: what the host takes to launch is not timed, unless it takes longer than the work.
    """
    for _ in range(warmup):
        for run in runs.values():
            run()
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = defaultdict(list)
    for _ in range(rounds):
        torch.cuda.synchronize()
        torch.cuda._sleep(_HEAD_START)
        for name, run in runs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            events[name].append((begin, end))
    torch.cuda.synchronize()
    return {name: statistics.median(b.elapsed_time(e) for b, e in pairs) for name, pairs in events.items()}


def copy_bandwidth(bytes_each_way: int = 1 << 28) -> float:
    """Bytes a second, read and written, of a copy within the GPU's memory."""
    source = torch.empty(bytes_each_way, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    milliseconds = interleaved({"copy": lambda: target.copy_(source)})["copy"]
    return 2 * bytes_each_way / milliseconds * 1e3


def kernel_times(run: Run, runs: int = 2) -> dict[str, float]:
    """Milliseconds of GPU time a run by kernel name, largest first."""
    run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profiler:
        for _ in range(runs):
            run()
        torch.cuda.synchronize()
    times: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        if event.self_device_time_total:
            times[event.key] += event.self_device_time_total / 1e3 / runs
    return dict(sorted(times.items(), key=lambda item: -item[1]))


def low_precision_share(kernels: Mapping[str, float]) -> float:
    """Share of the GEMM kernels' time that runs in 8 bits, by their names; 0 where no kernel is a GEMM."""
    gemms = {name: time for name, time in kernels.items() if _GEMM.search(name)}
    low = sum(time for name, time in gemms.items() if _LOW_PRECISION.search(name))
    return low / sum(gemms.values()) if gemms else 0.0
