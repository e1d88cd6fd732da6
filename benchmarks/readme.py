"""Draws README's results table from the raw numbers of `make bench`: ``python -m benchmarks.readme RESULTS.json``.

It replaces what stands between the two markers; `tests/test_bench.py` checks that nobody else changed it.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning_int8.bench.report import HOW

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- drawn by benchmarks/readme.py from {} -->", "<!-- end -->"
# Features from which the goals of a GEMM and of a linear layer count.
GEMM_WIDE, WIDE = 2048, 4096
Cells = Mapping[str, Mapping[str, Any]]


def spread(ratios: list[float]) -> str:
    """The geometric mean, and of several the lowest, the highest and their number."""
    if not ratios:
        return "–"
    mean = f"{statistics.geometric_mean(ratios):.2f}"
    return mean if len(ratios) == 1 else f"{mean} ({min(ratios):.2f} – {max(ratios):.2f}; {len(ratios)} lines)"


def rows(results: Mapping[str, Any]) -> Iterator[tuple[str, Callable[[str], str]]]:
    """Each row's heading, and its cell by precision."""

    def ratios(lines: list[Cells], head: str) -> str:
        return spread([cells[head]["ratio"] for cells in lines if "ratio" in cells.get(head, {})])

    def gemms(products: tuple[str, ...]) -> list[Cells]:
        wide = [line for line in results["gemm"] if min(line["k"], line["n"]) >= GEMM_WIDE]
        return [line["cells"] for line in wide if line["product"] in products]

    both, wgrad = gemms(("forward", "dgrad")), gemms(("wgrad",))
    for name, lines, rate in (
        (f"GEMMs, K and N ≥ {GEMM_WIDE}, no fallback", both + wgrad, "r=0"),
        ("the same, r = 0.05: forward, dgrad", both, "r=0.05"),
        ("the same, r = 0.2: forward, dgrad", both, "r=0.2"),
        ("the same, r = 0.2: wgrad, fallback on both operands", wgrad, "r=0.2"),
    ):
        # FP8's products have no rates, and stand beside those of ours that were timed.
        if any(head.endswith(f" {rate}") for cells in lines for head in cells):
            yield (
                name,
                lambda head, lines=lines, rate=rate: ratios(
                    lines, head if head.startswith("fp8") else f"{head} {rate}"
                ),
            )
    wide = [line["cells"] for line in results["linear"] if min(line["k"], line["n"]) >= WIDE]
    small = [line["cells"] for line in results["linear"] if min(line["k"], line["n"]) < WIDE]
    yield f"one linear, forward and backward, K and N ≥ {WIDE}", lambda head: ratios(wide, head)
    yield "one linear, smaller", lambda head: ratios(small, head)
    for line in results["step"]:
        cells = line["cells"]
        least = f", min_features={line['min_features']}" if line["min_features"] else ""
        yield (
            f"training step, {line['model']}, {HOW[line['compiling']]}{least}",
            lambda head, cells=cells: ratios([cells], head),
        )
        yield (
            "mean fallback rate in it",
            lambda head, cells=cells: (
                f"{cells[head]['fallback_rate']:.2f}" if "fallback_rate" in cells.get(head, {}) else "–"
            ),
        )
        if cells["bf16"].get("peak_gib"):
            yield (
                f"peak memory of it ({cells['bf16']['peak_gib']:.1f} GiB in BF16)",
                lambda head, cells=cells: (
                    f"{cells[head]['peak_gib'] / cells['bf16']['peak_gib']:.2f}"
                    if cells.get(head, {}).get("peak_gib")
                    else "–"
                ),
            )


def table(results: Mapping[str, Any]) -> str:
    """The Markdown table: times BF16, geometric mean (lowest – highest)."""
    lines = [line["cells"] for section in ("linear", "step") for line in results[section]]
    heads = list(dict.fromkeys(head for cells in lines for head in cells if head != "bf16"))
    gpu = results["about"]["device"]
    drawn = [f"| times BF16, {gpu} | {' | '.join(heads)} |", "|" + "---|" * (1 + len(heads))]
    for name, cell in rows(results):
        texts = [cell(head) for head in heads]
        if set(texts) != {"–"}:
            drawn.append(f"| {name} | {' | '.join(texts)} |")
    return "\n".join(drawn)


def drawn(text: str, source: str, results: Mapping[str, Any]) -> str:
    """``text`` with the table between the markers, which name ``source``.

    Raises:
        ValueError: The markers are not there.
    """
    head, begin, rest = text.partition(BEGIN.partition("{}")[0])
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md has no '{BEGIN}' ... '{END}' to draw between.")
    return f"{head}{BEGIN.format(source)}\n{table(results)}\n{END}{tail}"


def main() -> None:
    """Rewrites README.md."""
    source = Path(sys.argv[1]).resolve()
    readme = ROOT / "README.md"
    name = source.relative_to(ROOT).as_posix()
    readme.write_text(drawn(readme.read_text(), name, json.loads(source.read_text())))


if __name__ == "__main__":
    main()
