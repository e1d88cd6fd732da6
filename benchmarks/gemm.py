"""Times a backend's GEMMs against cuBLAS BF16 at the linears of a 1B and an 8B Llama, after checking them.

``python benchmarks/gemm.py [--backend triton] [--tokens 16384] [--rates 0 0.1 0.2 0.3] [--json gemm.json]``

The three products of a linear ``[N, K]`` over ``M`` tokens: forward (X may have fallback blocks), dgrad (dY may) and
wgrad (both may). Operands are made as integers (low plane normal with a deviation of 32, high plane within ±3), so this
times the GEMM and the lists it makes of its fallback blocks, without quantization. TFLOP/s are of the product, 2·M·N·K,
whatever the extra work. Each time is a median, each ratio to the BF16 product timed just before it. Every line was
checked first: corners of the output against exact integers (``row``: equal after BF16 rounding; ``block``: 40 dB).
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import statistics
import sys
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.testing import do_bench

from lightning_int8.kernels import backends, reference
from lightning_int8.kernels.planes import QuantizedMatrix, blocks_along

# (K, N) of the linears of a 1B and an 8B Llama.
LINEARS = ((4096, 4096), (4096, 14336), (14336, 4096), (2048, 2048), (2048, 8192), (8192, 2048))
BLOCK = 128
CORNER = 256


def operand(rows: int, depth: int, rate: float, scaling: str, scaled: bool) -> QuantizedMatrix:
    """A random ``[rows, depth]`` with a fraction ``rate`` of fallback blocks."""
    shape = blocks_along(rows, BLOCK), blocks_along(depth, BLOCK)
    low = torch.zeros(rows, shape[1] * BLOCK, dtype=torch.int8, device="cuda")
    low[:, :depth] = (
        torch.empty(rows, depth, dtype=torch.float16, device="cuda").normal_(0, 32).round_().clamp_(-127, 127)
    )
    high = slot = scale = None
    if rate:
        mask = torch.rand(shape, device="cuda") < rate
        slot = (mask.flatten().cumsum(0).view(shape) - 1).where(mask, -1).to(torch.int32)
        high = torch.randint(-3, 4, (int(mask.sum()) + 1, BLOCK, BLOCK), dtype=torch.int8, device="cuda")
    if scaling == "block" or scaled:
        scale = torch.rand(shape if scaling == "block" else rows, device="cuda") * 1e-2
    return QuantizedMatrix(low, high, slot, scale, (rows, depth), BLOCK)


def products(tokens: int, k: int, n: int) -> dict[str, tuple[int, int, int]]:
    """Rows, columns and contraction of a linear's three products."""
    return {"forward": (tokens, n, k), "dgrad": (tokens, k, n), "wgrad": (n, k, tokens)}


def part(a: QuantizedMatrix, start: int) -> QuantizedMatrix:
    """Some rows of ``a`` from a multiple of the block edge on."""
    rows, blocks = slice(start, start + CORNER), slice(start // BLOCK, (start + CORNER) // BLOCK)
    low = a.low[rows]
    slot = None if a.slot is None else a.slot[blocks]
    scale = None if a.scale is None else a.scale[blocks if a.scale.dim() == 2 else rows]
    return QuantizedMatrix(low, a.high, slot, scale, (low.shape[0], a.size[1]), BLOCK)


def check(out: Tensor, a: QuantizedMatrix, b: QuantizedMatrix, scaling: str) -> None:
    """Raises unless the corners of ``out`` are right."""
    if not out.isfinite().all():
        raise AssertionError("the output has elements that are not finite")
    for i in (0, (a.size[0] - 1) // BLOCK * BLOCK):
        for j in (0, (b.size[0] - 1) // BLOCK * BLOCK):
            wanted = getattr(reference, f"gemm_{scaling}")(part(a, i), part(b, j), None, out.dtype).double()
            noise = out[i : i + CORNER, j : j + CORNER].double() - wanted
            sqnr = 10 * torch.log10(wanted.square().sum() / noise.square().sum()).item()
            if sqnr < (float("inf") if scaling == "row" else 40):
                raise AssertionError(f"{scaling} {a.size}x{b.size} at ({i}, {j}): SQNR {sqnr:.1f} dB")


def bf16_time(name: str, rows: int, columns: int, depth: int, rep: int) -> float:
    """Milliseconds of cuBLAS on the operands as autograd has them."""
    a = torch.randn((depth, rows) if name == "wgrad" else (rows, depth), device="cuda", dtype=torch.bfloat16)
    b = torch.randn((columns, depth) if name == "forward" else (depth, columns), device="cuda", dtype=torch.bfloat16)
    a = a.t() if name == "wgrad" else a
    b = b.t() if name == "forward" else b
    return do_bench(lambda: a @ b, warmup=10, rep=rep, return_mode="median")


def main() -> int:
    """Prints the table; returns the number of products that were wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="auto", help="one of ours, or 'auto'")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.0, 0.1, 0.2, 0.3])
    parser.add_argument("--linears", type=int, default=len(LINEARS), help="how many of the linears, from the first on")
    parser.add_argument("--scalings", nargs="+", default=["row", "block"])
    parser.add_argument("--rep", type=int, default=15, help="milliseconds a median is taken over")
    parser.add_argument("--json", type=Path, help="write the results here too")
    args = parser.parse_args()
    torch.manual_seed(0)
    backend = backends.choose(args.backend, torch.device("cuda"))
    ops = backends.load(backend)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, backend {backend}")
    about = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        "backend": backend, "date": datetime.date.today().isoformat(), "command": " ".join(sys.argv),
    }  # fmt: skip
    heads = [f"{s} {r:g}" for s in args.scalings for r in args.rates]
    print(f"{'TFLOP/s (times cuBLAS BF16)':35} {'BF16':>6} " + " ".join(f"{head:>12}" for head in heads))
    lines, wrong = [], 0
    for k, n in LINEARS[: args.linears]:
        for name, (rows, columns, depth) in products(args.tokens, k, n).items():
            flops = 2 * rows * columns * depth
            bf16 = bf16_time(name, rows, columns, depth, args.rep)
            line = {"k": k, "n": n, "product": name, "tokens": args.tokens, "bf16": flops / bf16 / 1e9}
            for scaling in args.scalings:
                gemm = getattr(ops, f"gemm_{scaling}")
                for rate in args.rates:
                    a = operand(rows, depth, rate, scaling, True)
                    b = operand(columns, depth, rate if name == "wgrad" else 0.0, scaling, name == "forward")
                    head = f"{scaling} {rate:g}"
                    try:
                        check(gemm(a, b, None, torch.bfloat16), a, b, scaling)
                    except AssertionError as error:
                        print(f"WRONG {name}: {error}", file=sys.stderr)
                        wrong += 1
                    run = functools.partial(gemm, a, b, None, torch.bfloat16)
                    ms = do_bench(run, warmup=10, rep=args.rep, return_mode="median")
                    line[head] = flops / ms / 1e9
            lines.append(line)
            if args.json:
                # After each line, so that a run that is cut short leaves what it has measured.
                args.json.write_text(json.dumps({"about": about, "unit": "TFLOP/s", "lines": lines}, indent=1) + "\n")
            cells = " ".join(f"{line[head]:5.0f} ({line[head] / line['bf16']:.2f})" for head in heads)
            print(f"{name:8} K={k:<6} N={n:<6} {'':9} {line['bf16']:6.0f} {cells}", flush=True)
    for name in (*products(args.tokens, 1, 1), "all"):
        chosen = [line for line in lines if name in ("all", line["product"])]
        for what, summary in (("geomean", statistics.geometric_mean), ("lowest", min)):
            ratios = (summary(line[head] / line["bf16"] for line in chosen) for head in heads)
            print(f"{name:8} {what:33} " + " ".join(f"{'':5} ({ratio:.2f})" for ratio in ratios))
    return wrong


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
