"""Bandwidth of the quantize kernels against a device-to-device copy measured in the same run.

``python benchmarks/quantize.py [--rows 16384] [--columns 4096] [--rate 0.2]``

Every byte that an op reads and writes is counted once for each time it has to: the tensor twice (its statistics come
before its integers), each plane, the fallback blocks' high bytes, slots, scales, and the partial statistics written and
read in between. A kernel line shows that kernel alone; an op line all three, with the gaps between launches.
"""

from __future__ import annotations

import argparse
import statistics as stats
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch

from lightning_int8.kernels import hadamard, hadamard_mixed, quantize, quantize_gradient, swiglu
from lightning_int8.kernels.hadamard_ops import TOKENS
from lightning_int8.kernels.planes import blocks_along, fallback_capacity


def milliseconds(run: Callable[[], object], repeats: int = 20) -> float:
    """Median time of ``run`` on the device."""
    for _ in range(3):
        run()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    # The queue is kept full, so that what the host takes to launch is not timed.
    torch.cuda._sleep(20_000_000)
    for begin, end in events:
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return stats.median(begin.elapsed_time(end) for begin, end in events)


def kernel_milliseconds(run: Callable[[], object], repeats: int = 10) -> dict[str, float]:
    """Median time of each kernel in ``run``."""
    run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(repeats):
            run()
        torch.cuda.synchronize()
    times = defaultdict(list)
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            times[event.name].append(event.device_time / 1000)
    return {name: stats.median(values) for name, values in times.items()}


def copy_bandwidth(rows: int, columns: int) -> float:
    """Bytes a second, read and written, of copying a bfloat16 tensor of this size."""
    x = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
    y = torch.empty_like(x)
    return 2 * x.nbytes / milliseconds(lambda: y.copy_(x)) * 1e3


class Case:
    """One op on one tensor: how to run it, and the bytes it moves in all."""

    def __init__(self, op: str, rows: int, columns: int, block: int, rate: float, transposed: bool = False) -> None:
        x = torch.randn(rows, columns, device="cuda").mul_(torch.randn(rows, 1, device="cuda").exp_()).bfloat16()
        if transposed:
            x = x.t().contiguous().t()
        self.op, self.rate, self.rows, self.columns, self.block = op, rate, rows, columns, block
        blocks = blocks_along(rows, block) * blocks_along(columns, block)
        capacity = fallback_capacity(blocks, (0.1, rate)) if rate else 0
        state = torch.full((3, 4), float("nan"), device="cuda")
        state[:, 1:3] = 0
        s, t, m = (torch.rand(n, device="cuda") + 0.5 for n in (rows, columns, rows))
        m *= 127
        self.run: Callable[[], Sequence[torch.Tensor]]
        out: Sequence[torch.Tensor]
        stochastic = "all" if op.endswith("stochastic") else "small" if op.endswith("small") else "nothing"
        reads = 2 * x.nbytes
        gradient_partial = 4 * (2 * rows * blocks_along(columns, block) + 2 * columns * blocks_along(rows, block))
        if op == "swiglu":
            up = torch.randn_like(x)
            self.run = lambda: swiglu.swiglu_row(x, up, state, 0, rate, capacity, block, True, True)
            _, *out = self.run()
            fallen = int((out[4] >= 0).sum()) * 2
            partial = 4 * rows * blocks_along(columns, block) * (2 if capacity else 1)
            # Gate, up and h are read, h is written.
            reads = 4 * x.nbytes
        elif op == "swiglu gradient":
            gate, up = torch.randn_like(x), torch.randn_like(x)
            other = state.clone()

            def of_both() -> list[torch.Tensor]:
                dgate, dup, *found = swiglu.swiglu_gradient(x, gate, up, t, t, s, m, capacity, block, False)
                return [
                    plane
                    for i, (dy, states) in enumerate(((dgate, state), (dup, other)))
                    for plane in quantize_gradient.quantize_row_gradient(
                        dy, t, s, m, states, rate, capacity, block, True, "nothing", False, [part[i] for part in found]
                    )
                ]

            self.run = of_both
            out = self.run()
            fallen = sum(int((out[i] >= 0).sum()) for i in (2, 6, 11, 15))
            partial = 2 * gradient_partial
            # dH, gate, up and both gradients are read, both gradients are written.
            reads = 7 * x.nbytes
        elif op in ("mixed", "mixed, rows"):
            both = op == "mixed"
            self.run = lambda: hadamard_mixed.quantize_mixed(x, state, 0, rate, capacity, block, True, both, False)
            out = self.run()
            fallen = int((out[2] >= 0).sum())
            partial = 4 * rows * blocks_along(columns, block) * (2 if capacity else 1)
            if both:
                partial += 4 * columns * (blocks_along(rows, TOKENS) + 1)
        elif op in ("mixed, W", "row, W"):
            # Float32, as master weights are, and read once.
            weight = x.float()
            if op == "mixed, W":
                self.run = lambda: hadamard_mixed.quantize_mixed(weight, None, 0, 0.0, 0, block, False, False, False)
            else:
                self.run = lambda: quantize.quantize_row(weight, None, 0, 0.0, 0, block, False, False)
            out, fallen, partial, reads = self.run(), 0, 0, weight.nbytes
        elif op.startswith("gradient"):
            arguments = x, t, s, m, state, rate, capacity, block, True, stochastic, True
            self.run = lambda: quantize_gradient.quantize_row_gradient(*arguments)
            out = self.run()
            fallen = int((out[2] >= 0).sum() + (out[6] >= 0).sum())
            # AbsMax and weighted sums both ways, and sums of columns.
            partial = gradient_partial + 4 * columns * blocks_along(rows, block)
        elif op.startswith("hadamard"):
            up = torch.randn_like(x) if op == "hadamard, swiglu" else None
            self.run = lambda: hadamard.quantize_hadamard(x, up, block, False)
            out, fallen = self.run(), 0
            partial = 4 * columns * (blocks_along(rows, TOKENS) + 1)
            if up is not None:
                reads *= 2
        elif op.startswith("row"):
            transpose = op != "row, one layout"
            self.run = lambda: quantize.quantize_row(x, state, 0, rate, capacity, block, True, transpose)
            out = self.run()
            fallen = int((out[4] >= 0).sum()) * (2 if transpose else 1)
            partial = 4 * rows * blocks_along(columns, block) * (2 if capacity else 1)
        else:
            self.run = lambda: quantize.quantize_block(x, state, 0, rate, capacity, block, True, True, stochastic)
            out = self.run()
            fallen, partial = int((out[4] >= 0).sum()) * 2, 0
        written = sum(t.nbytes for t in out if t.dim() != 3) + fallen * block * block
        self.bytes = reads + written + 2 * partial


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=16384)
    parser.add_argument("--columns", type=int, nargs="*", default=[4096, 14336])
    parser.add_argument("--blocks", type=int, nargs="*", default=[128])
    parser.add_argument("--rate", type=float, default=0.2)
    parser.add_argument("--kernels", action="store_true", help="also time each kernel")
    arguments = parser.parse_args()
    rows = arguments.rows
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for columns in arguments.columns:
        copy = copy_bandwidth(rows, columns)
        print(f"\n[{rows}, {columns}] bfloat16; copy {copy / 1e12:.2f} TB/s")
        print(f"{'op':22} B    rate   µs     TB/s  of copy")
        for block in arguments.blocks:
            for op, rate in (
                ("row", arguments.rate), ("row", 0.0), ("row, one layout", 0.0), ("gradient", arguments.rate),
                ("gradient, stochastic", arguments.rate), ("gradient, stochastic small", arguments.rate),
                ("block", arguments.rate), ("block, stochastic", 0.2),
                ("swiglu", arguments.rate), ("swiglu gradient", arguments.rate),
                ("hadamard", 0.0), ("hadamard, swiglu", 0.0), ("mixed", arguments.rate), ("mixed", 0.0),
                ("mixed, rows", arguments.rate), ("mixed, rows", 0.0), ("row, W", 0.0), ("mixed, W", 0.0),
            ):  # fmt: skip
                case = Case(op, rows, columns, block, rate)
                ms = milliseconds(case.run)
                speed = case.bytes / ms * 1e3
                print(f"{op:22} {block:<4} {rate:<4} {ms * 1e3:6.1f}  {speed / 1e12:6.2f}  {speed / copy:6.0%}")
                if arguments.kernels:
                    for name, time in kernel_milliseconds(case.run).items():
                        print(f"    {name:30} {time * 1e3:6.1f}")


if __name__ == "__main__":
    main()
