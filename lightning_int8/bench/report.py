"""What the benchmark leaves behind: JSON (everything), Markdown and terminal tables, and a plot of the ratios."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from rich.table import Table as RichTable

# Below this share of its GEMM time in 8 bits, a peer is not what its name says; a step's output head is in BF16.
LOW_PRECISION = 0.2

# How a step was compiled, in words.
HOW = {"graphs": "layers compiled, CUDA graphs", "layers": "layers compiled", "none": "eager"}


class Table:
    """Rows of text under headings, with a title that says what is measured and a note on how.

    Args:
        title: One line.
        note: What a reader has to know of every line; may be empty.
        headings: Of the columns.
        rows: As many cells each.
    """

    def __init__(self, title: str, note: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        self.title, self.note, self.headings, self.rows = title, note, headings, rows

    def markdown(self) -> str:
        """The table as GitHub draws it."""
        lines = [f"| {' | '.join(cells)} |" for cells in (self.headings, *self.rows)]
        lines.insert(1, "|" + "---|" * len(self.headings))
        return "\n".join([f"## {self.title}", *([self.note] if self.note else []), "", *lines, ""])

    def rich(self) -> RichTable:
        """The table for a terminal."""
        from rich.table import Table as RichTable

        table = RichTable(title=self.title, caption=self.note or None, title_justify="left", caption_justify="left")
        for heading in self.headings:
            table.add_column(heading, justify="left" if heading == self.headings[0] else "right")
        for row in self.rows:
            table.add_row(*row)
        return table


def tables(results: Mapping[str, Any]) -> list[Table]:
    """All that ``results``, which ``lightning-int8-bench`` writes as JSON, has measured."""
    found = [_gemms(results["gemm"]), _linears(results["linear"])]
    found += [_step(line) for line in results["step"]]
    if results["first_step"]:
        found.append(_first_steps(results["first_step"]))
    return [table for table in found if table.rows]


def _heads(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(head for line in lines for head in line["cells"]))


def _cell(cell: Mapping[str, Any], value: str) -> str:
    """What was measured with its ratio; or why there is nothing; or that it was not what it seems."""
    for reason in ("error", "skipped"):
        if reason in cell:
            return f"{reason}: {cell[reason]}"
    if "ms" not in cell:
        return "–"
    text = f"{value} ({cell['ratio']:.2f})" if cell.get("ratio", 1.0) != 1.0 else value
    return text + ("" if _is_low(cell) else " – ran BF16 kernels")


def _is_low(cell: Mapping[str, Any]) -> bool:
    return cell.get("low_precision_share", 1.0) >= LOW_PRECISION


def _gemms(lines: Sequence[Mapping[str, Any]]) -> Table:
    heads = _heads(lines)
    rows = []
    for line in lines:
        cells = line["cells"]
        model = [_of_model(cells.get(head, {})) for head in heads]
        texts = [
            _cell(cells.get(head, {}), f"{cells.get(head, {}).get('tflops', 0):.0f}") + share
            for head, share in zip(heads, model, strict=True)
        ]
        rows.append([line["product"], f"{line['k']}, {line['n']}", *texts])
    tokens = lines[0]["tokens"] if lines else 0
    note = (
        "TFLOP/s of the product (times BF16), percent of the modelled roofline. `r`: rate of fallback blocks, in a "
        "wgrad that has any of both operands. `int8-torch` is `torch._int_mm`, without scales."
    )
    return Table(f"GEMMs, M = {tokens}", note, ["product", "K, N", *heads], rows)


def _of_model(cell: Mapping[str, Any]) -> str:
    return f" {cell['model_ms'] / cell['ms']:.0%}" if "model_ms" in cell and "ms" in cell else ""


def _linears(lines: Sequence[Mapping[str, Any]]) -> Table:
    heads = _heads(lines)
    rows = []
    for line in lines:
        texts = [
            _cell(line["cells"].get(head, {}), f"{line['cells'].get(head, {}).get('ms', 0) * 1e3:.0f}")
            + _of_model(line["cells"].get(head, {}))
            for head in heads
        ]
        rates = {head: cell["fallback_rate"] for head, cell in line["cells"].items() if "fallback_rate" in cell}
        each = ", ".join(f"{head} {rate:.2f}" for head, rate in rates.items())
        rows.append([f"{line['k']} → {line['n']}", *texts, each or "–"])
    tokens = lines[0]["tokens"] if lines else 0
    weights = sorted({line["weights"] for line in lines})
    note = (
        "Microseconds of GPU time (times BF16), percent of the modelled roofline where there is one. Forward and "
        f"backward with all casts and quantization, weights in {' and '.join(weights)}; torchao's layers are compiled."
    )
    return Table(f"One linear layer, {tokens} tokens", note, ["in → out", *heads, "fallback rates"], rows)


def _step(line: Mapping[str, Any]) -> Table:
    rows = []
    for head, cell in line["cells"].items():
        text = _cell(cell, f"{cell.get('ms', 0):.1f}")
        peak = f"{cell['peak_gib']:.1f}" if cell.get("peak_gib") else "–"
        first = f"{cell['first_step_s']:.1f}" if "first_step_s" in cell else "–"
        rate = f"{cell['fallback_rate']:.2f}" if "fallback_rate" in cell else "–"
        busy = f"{min(1.0, cell['gpu_ms'] / cell['ms']):.0%}" if "gpu_ms" in cell else "–"
        rows.append([head, text, busy, peak, first, rate])
    how = HOW[line["compiling"]]
    least = f", min_features={line['min_features']}" if line["min_features"] else ""
    title = f"Training step of {line['model']}, {line['tokens']} tokens, {how}{least}"
    note = (
        "Milliseconds (times BF16). BF16 autocast, float32 weights, fused AdamW, thresholds moved; one precision after "
        "the other. Memory is what was reserved. First step: what was not compiled ahead is compiled in it."
    )
    return Table(
        title, note, ["precision", "ms a step", "GPU busy", "peak GiB", "first step, s", "fallback rate"], rows
    )


def _first_steps(lines: Sequence[Mapping[str, Any]]) -> Table:
    def text(line: Mapping[str, Any], key: str) -> str:
        return f"{line[key]:.1f}" if key in line else str(line.get("error", "–"))

    keys = ("bf16", "empty cache", "warm cache")
    rows = [[line["model"], line["recipe"], *(text(line, key) for key in keys)] for line in lines]
    note = "Seconds of the first eager step of a fresh process, model already on the GPU; caches are Triton's."
    return Table(
        "First training step", note, ["model", "recipe", "BF16", "INT8, empty cache", "INT8, warm cache"], rows
    )


def markdown(results: Mapping[str, Any], image: str | None) -> str:
    """The whole result page, with the plot of that name."""
    about = results["about"]
    packages = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    head = [
        f"# {about['device']}, {about['date']}",
        "",
        f"`{about['command']}`, {about['seconds']:.0f} s. {packages}. A copy moves "
        f"{about['copy_bandwidth'] / 1e12:.2f} TB/s. Medians of interleaved rounds.{_compiled(about)}",
        "",
        *([f"![times BF16]({image})", ""] if image else []),
    ]
    advice = ["## Advice", *(f"- {line}" for line in results["advice"]), ""] if results["advice"] else []
    skipped = ["## Not measured", *(f"- {line}" for line in results["skipped"]), ""] if results["skipped"] else []
    return "\n".join([*head, *(table.markdown() for table in tables(results)), *advice, *skipped])


def _compiled(about: Mapping[str, Any]) -> str:
    compiled = about.get("compiled_ahead")
    if not compiled:
        return ""
    failed = f", {len(compiled['errors'])} failed (see the JSON)" if compiled["errors"] else ""
    return f" Compiled ahead: {compiled['ended']} of {compiled['jobs']} jobs in {compiled['seconds']:.0f} s{failed}."


def _panels(results: Mapping[str, Any]) -> dict[str, dict[str, dict[str, Mapping[str, Any]]]]:
    """By panel and line the cells that have a ratio, but for BF16's own."""
    panels = {
        "GEMM": [(f"{x['product']} {x['k']}, {x['n']}", x["cells"]) for x in results["gemm"]],
        "Linear layer": [(f"{x['k']} → {x['n']}", x["cells"]) for x in results["linear"]],
        "Training step": [(x["model"], x["cells"]) for x in results["step"]],
    }
    measured: dict[str, dict[str, dict[str, Mapping[str, Any]]]] = {title: {} for title in panels}
    for title, lines in panels.items():
        for line, cells in lines:
            # A second run may have measured it again.
            label = f"{line}, again" if line in measured[title] else line
            measured[title][label] = {h: cell for h, cell in cells.items() if h != "bf16" and "ratio" in cell}
    return {title: lines for title, lines in measured.items() if any(lines.values())}


def plot(results: Mapping[str, Any], file: Path) -> None:
    """Draws every ratio to BF16 as a bar, with a mark where the modelled roofline lies, one panel a table."""
    panels = _panels(results)
    heights = [1 + 0.45 * len(lines) for lines in panels.values()]
    figure = Figure(figsize=(10, 1 + sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, (title, lines) in zip(axes, panels.items(), strict=True):
        heads = list(dict.fromkeys(head for line in lines.values() for head in line))
        width = 0.8 / len(heads)
        for index, head in enumerate(heads):
            cells = {row + index * width: line[head] for row, line in enumerate(lines.values()) if head in line}
            axis.barh(list(cells), [cell["ratio"] for cell in cells.values()], width, label=head)
            modelled = {place: cell for place, cell in cells.items() if "model_ms" in cell}
            limits = [cell["ratio"] * cell["ms"] / cell["model_ms"] for cell in modelled.values()]
            axis.plot(limits, list(modelled), "k|", markersize=6)
        axis.set_yticks([row + 0.4 - width / 2 for row in range(len(lines))], list(lines))
        axis.invert_yaxis()
        axis.axvline(1.0, color="gray", lw=1)
        axis.set_title(f"{title}: times BF16 (right of the line is faster; |: roofline)", loc="left", fontsize=10)
        axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    figure.savefig(file, dpi=110)


def added(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """The results of two runs on the same GPU as those of one.

    Raises:
        ValueError: The runs were on different GPUs or with different versions.
    """
    for key in ("device", "versions"):
        if old["about"][key] != new["about"][key]:
            raise ValueError(f"--add: {key} was {old['about'][key]}, is {new['about'][key]}; use another --output.")
    about = {
        **new["about"],
        "seconds": old["about"]["seconds"] + new["about"]["seconds"],
        "command": f"{old['about']['command']}` and `{new['about']['command']}",
    }
    return {key: about if key == "about" else [*old[key], *value] for key, value in new.items()}


def write(results: Mapping[str, Any], file: Path) -> list[Path]:
    """Writes ``file`` with the endings ``.json``, ``.md`` and, where there is a ratio to draw, ``.png``."""
    # No suffix is taken off: a GPU's name may hold a dot.
    json_file, md_file, png_file = (file.with_name(file.name + end) for end in (".json", ".md", ".png"))
    file.parent.mkdir(parents=True, exist_ok=True)
    json_file.write_text(json.dumps(results, indent=1) + "\n")
    drawn = bool(_panels(results))
    md_file.write_text(markdown(results, png_file.name if drawn else None))
    if not drawn:
        return [json_file, md_file]
    plot(results, png_file)
    return [json_file, md_file, png_file]
