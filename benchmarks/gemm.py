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
from triton.testing import do_bench

from lightning_int8.bench.gemm import bf16, check, operand, products
from lightning_int8.kernels import backends

# (K, N) of the linears of a 1B and an 8B Llama.
LINEARS = ((4096, 4096), (4096, 14336), (14336, 4096), (2048, 2048), (2048, 8192), (8192, 2048))


def bf16_time(name: str, rows: int, columns: int, depth: int, rep: int) -> float:
    """Milliseconds of cuBLAS on the operands as autograd has them."""
    return do_bench(bf16(name, rows, columns, depth), warmup=10, rep=rep, return_mode="median")


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
