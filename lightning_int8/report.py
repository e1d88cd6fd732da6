"""What a conversion did to each linear layer, as data, as one line and as a table."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lightning_int8.names import collapse_indices

if TYPE_CHECKING:
    from rich.table import Table

Status = Literal["converted", "already converted", "ignored", "skipped"]


@dataclass(frozen=True)
class LayerReport:
    """One linear layer (or what looks like one) in a :class:`ConversionReport`.

    Attributes:
        name: Its first name in the module, without wrapper segments; ``""`` for the module itself.
        in_features: Contraction of the forward GEMM (K), or ``None`` where unknown.
        out_features: Columns of the forward GEMM (N), or ``None`` where unknown.
        shared: Other names of the same layer, and names of the parameters its weight is tied to.
        status: ``"converted"``, ``"already converted"``, ``"ignored"`` (by a pattern) or ``"skipped"``.
        reason: Why it was ignored or skipped; empty when converted.
        backend: Kernels that run it where it is now; empty when it is not converted.
    """

    name: str
    in_features: int | None
    out_features: int | None
    shared: tuple[str, ...]
    status: Status
    reason: str
    backend: str


@dataclass(frozen=True)
class ConversionReport:
    """What :func:`lightning_int8.convert_to_int8` did.

    Attributes:
        recipe: The recipe, as :meth:`Int8Recipe.describe` names it.
        rows: One entry a layer, in module order.
        fused: Names of the SwiGLU modules that :func:`lightning_int8.fusion.fuse_swiglu` has found.
    """

    recipe: str
    rows: tuple[LayerReport, ...]
    fused: tuple[str, ...] = ()

    @property
    def converted(self) -> tuple[str, ...]:
        """Names of the layers that compute in INT8 now, whether or not this call converted them."""
        return tuple(row.name for row in self.rows if row.status in ("converted", "already converted"))

    @property
    def newly_converted(self) -> tuple[str, ...]:
        """Names of the layers that this call converted."""
        return tuple(row.name for row in self.rows if row.status == "converted")

    @property
    def skipped(self) -> dict[str, str]:
        """Why each other layer was left as it is, by its name."""
        return {row.name: row.reason for row in self.rows if row.status in ("ignored", "skipped")}

    def summary(self) -> str:
        """One line: how many layers compute in INT8, with what share of the linear weights, and what does not."""
        weights = Counter[bool]()
        for row in self.rows:
            weights[row.status in ("converted", "already converted")] += (row.in_features or 0) * (
                row.out_features or 0
            )
        share = weights[True] / max(1, sum(weights.values()))
        line = (
            f"INT8 (recipe {self.recipe}): {len(self.converted)} of {len(self.rows)} linear layers, "
            f"{share:.1%} of their weights"
        )
        kernels = sorted({row.backend for row in self.rows if row.backend})
        if kernels:
            line += f"; {', '.join(kernels)} kernels"
        if self.fused:
            line += f"; SwiGLU fused in {_abridged([name or 'the module itself' for name in self.fused])}"
        groups: dict[str, list[str]] = {}
        for name, reason in self.skipped.items():
            groups.setdefault(reason, []).append(name)
        if groups:
            shown = [f"{_abridged(names)} ({reason})" for reason, names in list(groups.items())[:4]]
            more = len(groups) - len(shown)
            line += f"; not converted: {', '.join(shown)}" + (f" and {more} more" if more else "")
        return line + "."

    def table(self) -> Table:
        """A rich table with one row for each group of repeated layers that fared alike."""
        from rich.table import Table

        table = Table(title=f"INT8 linear layers, recipe {self.recipe}", title_justify="left")
        for heading in ("layer", "in → out", "status", "kernels", "note"):
            table.add_column(heading, overflow="fold")
        groups: dict[tuple[str, ...], list[LayerReport]] = {}
        for row in self.rows:
            size = "?" if row.in_features is None else f"{row.in_features} → {row.out_features}"
            note = "; ".join(filter(None, [row.reason, f"shared with {_names(row.shared)}" if row.shared else ""]))
            key = (collapse_indices(row.name), size, row.status, row.backend, collapse_indices(note))
            groups.setdefault(key, []).append(row)
        for (name, *cells), rows in groups.items():
            table.add_row(_times(name if len(rows) > 1 else rows[0].name, len(rows)), *cells)
        return table


def _abridged(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _times(name: str, count: int) -> str:
    name = name or "(the module itself)"
    return f"{name} ×{count}" if count > 1 else name


def _names(names: tuple[str, ...]) -> str:
    return ", ".join(names)
