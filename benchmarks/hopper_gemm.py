"""Times the Hopper GEMMs against cuBLAS BF16 at a Transformer's shapes: `python benchmarks/hopper_gemm.py`.

Operands are made directly as integers (low plane normal with a deviation of 32, high plane within ±3), so the table is
of the GEMM alone. Medians; ratios to the BF16 GEMM of the same product timed just before.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from triton.testing import do_bench

from lightning_int8.kernels import hopper
from lightning_int8.kernels.planes import QuantizedMatrix, blocks_along

# (N, K) of the linears of a 1B and an 8B Llama.
LINEARS = ((4096, 4096), (14336, 4096), (4096, 14336), (2048, 2048), (8192, 2048))
BLOCK = hopper.BLOCK


def operand(rows: int, depth: int, rate: float | None, scaling: str, folded: bool, seed: int = 0) -> QuantizedMatrix:
    """A random operand ``[rows, depth]`` with a fraction ``rate`` of fallback blocks (``None``: no planes for them)."""
    generator = torch.Generator("cuda").manual_seed(seed)
    shape = blocks_along(rows, BLOCK), blocks_along(depth, BLOCK)
    low = torch.empty(rows, shape[1] * BLOCK, device="cuda", dtype=torch.float16).normal_(0, 32, generator=generator)
    low = low.round_().clamp_(-127, 127).to(torch.int8)
    low[:, depth:] = 0
    high = slot = None
    if rate is not None:
        mask = torch.rand(shape, device="cuda", generator=generator) < rate
        slot = (mask.flatten().cumsum(0).view(shape) - 1).where(mask, -1).to(torch.int32)
        size = max(1, int(mask.sum())), BLOCK, BLOCK
        high = torch.randint(-3, 4, size, device="cuda", dtype=torch.int8, generator=generator)
        for block in range(shape[0]) if depth % BLOCK else ():
            if slot[block, -1] >= 0:
                high[slot[block, -1], :, depth % BLOCK :] = 0
    scale_shape = shape if scaling == "block" else (rows,)
    scale = torch.rand(scale_shape, device="cuda", generator=generator) * 1e-2
    if folded and scaling == "row":
        scale = None
    return QuantizedMatrix(low, high, slot, scale, (rows, depth), BLOCK)


def products(tokens: int, n: int, k: int, rate: float | None, scaling: str) -> dict[str, Callable]:
    """Makers of the operands of a linear's three GEMMs."""
    return {
        "forward": lambda: (operand(tokens, k, rate, scaling, False), operand(n, k, None, scaling, False, 1)),
        "dgrad": lambda: (operand(tokens, n, rate, scaling, False), operand(k, n, None, scaling, True, 1)),
        "wgrad": lambda: (operand(n, tokens, rate, scaling, False), operand(k, tokens, rate, scaling, True, 1)),
    }


def bf16_time(rows: int, cols: int, depth: int, name: str) -> float:
    """Milliseconds of cuBLAS for the product in the layouts autograd hands it."""
    make = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    if name == "forward":
        a, b = make(rows, depth), make(cols, depth).t()
    elif name == "dgrad":
        a, b = make(rows, depth), make(depth, cols)
    else:
        a, b = make(depth, rows).t(), make(depth, cols)
    return do_bench(lambda: a @ b, warmup=15, rep=50, return_mode="median")


def geomean(values: list[float]) -> float:
    """The geometric mean."""
    return math.exp(sum(map(math.log, values)) / len(values))


def main() -> None:
    """Prints the table; ``--json`` also writes it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--scaling", choices=("row", "block"), nargs="+", default=["row", "block"])
    parser.add_argument("--rates", type=float, nargs="+", default=[0.0, 0.2])
    parser.add_argument("--linears", type=int, default=len(LINEARS), help="how many of the shapes to time")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, M={args.tokens}")
    columns = [(scaling, rate) for scaling in args.scaling for rate in args.rates]
    print(f"{'':26}{'bf16':>8}" + "".join(f"{s + ' r=' + str(r):>18}" for s, r in columns) + "   TOPS (ratio)")
    rows, ratios = [], {c: {} for c in columns}
    for n, k in LINEARS[: args.linears]:
        for name in ("forward", "dgrad", "wgrad"):
            size = {"forward": (args.tokens, n, k), "dgrad": (args.tokens, k, n), "wgrad": (n, k, args.tokens)}[name]
            tops = 2e-9 * math.prod(size)
            bf16 = bf16_time(*size, name)
            line, row = f"{n:6}x{k:<6} {name:10}{tops / bf16:10.0f}", {"n": n, "k": k, "gemm": name, "bf16_ms": bf16}
            for scaling, rate in columns:
                a, b = products(args.tokens, n, k, rate or None, scaling)[name]()
                gemm = hopper.gemm_row if scaling == "row" else hopper.gemm_block
                time = do_bench(lambda: gemm(a, b, None, torch.bfloat16), warmup=15, rep=50, return_mode="median")  # noqa: B023
                ratios[scaling, rate].setdefault(name, []).append(bf16 / time)
                line += f"{tops / time:10.0f} ({bf16 / time:4.2f}x)"
                row[f"{scaling}_{rate}_ms"] = time
            print(line, flush=True)
            rows.append(row)
    for (scaling, rate), by_name in ratios.items():
        means = {name: geomean(values) for name, values in by_name.items()}
        total = geomean([v for values in by_name.values() for v in values])
        print(f"{scaling} r={rate}: geomean {total:.3f}x  " + "  ".join(f"{n} {m:.3f}x" for n, m in means.items()))
    if args.json:
        args.json.write_text(json.dumps({"device": torch.cuda.get_device_name(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
