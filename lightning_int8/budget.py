"""One budget of fallback blocks for a whole model, spent where a block removes the most error.

A fixed band gives every operand of every layer the same rate. Here the thresholds of all operands meet one price
instead: the error that the next fallback block would remove, relative to its operand's power, is the same everywhere,
and the price moves until the mean rate is the budget.

With `row` scaling an operand's error relative to its mean square P is S/12P, where S is the mean square of its scales,
and scales follow the threshold θ. Lowering ln θ by a little costs ρ = -d(rate)/d(ln θ) more blocks and removes 2S/12P:

    value of one more block ~ S / (P ρ)

With `block` scaling only the blocks above the threshold gain, and the value is θ²/P. S and P are sampled where the
operand is quantized. For ρ, a threshold alternates a little about its place, and ρ is the regression of the changes of
the rate on those of ln θ. Everything is computed on the device after the optimizer step, like the bands.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_int8.kernels.power import POWER_SUM, STEP_SUM

# Columns of FallbackState.tensor behind those of every recipe and of kernels/power.py: P and S; ln θ and rate at the
# last update that saw blocks; sums of the regression; how far ln θ is from its place; ln of the price.
POWER, STEP_POWER, LAST, LAST_RATE, SLOPE_XY, SLOPE_XX, OFFSET, PRICE = range(8, 16)
COLUMNS = 16

# Share of the last value that remains in an average: of P and S, and of the regression's sums.
POWER_MEMORY, SLOPE_MEMORY = 0.7, 0.9
# ρ before anything was measured, with the weight of a few steps; and its limits.
PRIOR_DENSITY, PRIOR_WEIGHT = 5.0, 0.02
MIN_DENSITY, MAX_DENSITY = 0.05, 50.0
MIN_VALUE, MAX_VALUE = 1e-30, 1e30
# ln θ alternates by at most this, and by what changes the rate by about `RATE_WIGGLE`.
MAX_WIGGLE, RATE_WIGGLE = 0.1, 0.02
# How much of its distance from the price ln θ covers in a step, and by how much the rate may change.
GAIN, MAX_RATE_STEP = 0.15, 0.05
PRICE_GAIN = 0.3
# By how much ln θ comes down in a step at most.
MAX_DESCENT = 0.03


def move_to_price(
    table: Tensor,
    threshold: Tensor,
    counts: tuple[Tensor, ...],
    weight: Tensor,
    limits: tuple[Tensor, Tensor, Tensor],
    budget: float,
    by_rows: bool,
) -> tuple[Tensor, Tensor]:
    """The next thresholds, and the columns from ``POWER`` on.

    Args:
        table: ``FallbackState.tensor`` of all layers with this budget, float32 ``[rows, 16]``.
        threshold: float32 ``[rows]``, NaN where not seeded.
        counts: Since the last update and of all ranks: fallback blocks, blocks, sums of mean squares and of scales, and
            their number, each ``[rows]``.
        weight: MMAs that one fallback block repeats, in any unit.
        limits: Lowest and highest rate, and largest factor of a step, each ``[rows]``.
        budget: Mean rate, weighted by ``weight``, that is aimed at.
        by_rows: Whether a row of the operand shares one scale (`row`), rather than a block.
    """
    fallback, total, power_sum, step_sum, samples = counts
    low, high, factor = limits

    def average(old: Tensor, new_sum: Tensor) -> Tensor:
        new = new_sum / samples  # NaN where nothing was sampled, or where the operand held one
        return torch.where(new.isfinite(), torch.where(old > 0, old + (1 - POWER_MEMORY) * (new - old), new), old)

    power, step_power = (average(table[:, column], new) for column, new in ((POWER, power_sum), (STEP_POWER, step_sum)))
    seen = (total > 0) & threshold.isfinite() & (power > 0)
    place = threshold.where(seen, 1.0).log()
    rate = (fallback / total).where(seen, 0.0)

    again = seen & (table[:, SLOPE_XX] > 0)
    change = (place - table[:, LAST]).where(again, 0.0)
    slope_xy = torch.where(again, table[:, SLOPE_XY], PRIOR_DENSITY * PRIOR_WEIGHT)
    slope_xx = torch.where(again, table[:, SLOPE_XX], PRIOR_WEIGHT)
    slope_xy = torch.where(again, SLOPE_MEMORY * slope_xy + change * (table[:, LAST_RATE] - rate), slope_xy)
    slope_xx = torch.where(again, SLOPE_MEMORY * slope_xx + change.square(), slope_xx)
    density = (slope_xy / slope_xx).clamp(MIN_DENSITY, MAX_DENSITY)

    error = step_power / density if by_rows else (2 * place).exp()
    value = (error / power).clamp(MIN_VALUE, MAX_VALUE).nan_to_num(MIN_VALUE).log()
    cost = (weight * total).where(seen, 0.0)
    spent = (cost * rate).sum() / cost.sum()
    excess = ((spent - budget) / budget).clamp(-1, 1)
    mean_value = (cost * value).sum() / cost.sum()
    priced = table[:, PRICE].isfinite() & (table[:, SLOPE_XX] > 0)
    # All rows hold the same price; those of a layer that joined later do not hold it yet.
    price = torch.where(priced.any(), (table[:, PRICE].where(priced, 0.0)).sum() / priced.sum(), mean_value)
    price = price + PRICE_GAIN * excess

    step = GAIN * (price - value)
    most = torch.minimum(factor.log(), MAX_RATE_STEP / density)
    step = torch.maximum(torch.minimum(step, most), -most)
    # Above the largest AbsMax a threshold changes nothing, and would not be found again when the values grow.
    step = torch.where(rate == 0, step.clamp_max(0.0), step)
    # Below a gap may lie the bulk of the blocks, all within a few percent, of which nothing has been seen yet.
    step = step.clamp_min(-MAX_DESCENT)
    step = torch.where(rate > high, most, torch.where(rate < low, -most, step))
    offset = torch.where(table[:, OFFSET] > 0, -1.0, 1.0) * (RATE_WIGGLE / density).clamp_max(MAX_WIGGLE)
    moved = torch.where(seen, (place - table[:, OFFSET] + step + offset).exp(), threshold)

    columns = torch.stack(
        [
            power,
            step_power,
            torch.where(seen, place, table[:, LAST]),
            torch.where(seen, rate, table[:, LAST_RATE]),
            torch.where(seen, slope_xy, table[:, SLOPE_XY]),
            torch.where(seen, slope_xx, table[:, SLOPE_XX]),
            torch.where(seen, offset, table[:, OFFSET]),
            price.expand_as(power).where(cost.sum() > 0, table[:, PRICE]),
        ],
        dim=1,
    )
    return moved, columns


def shared_weights(total: Tensor, weight: Tensor, group: Tensor) -> Tensor:
    """Weights in which those of rows that saw no blocks go to the row before them, in their group, that did.

    Layers that read one X share its planes, so the first of them counts blocks that all of their GEMMs repeat.

    Args:
        total: Blocks counted, float32 ``[rows]``, as the others.
        weight: MMAs that one fallback block repeats in the row's own layer.
        group: Equal positive numbers for rows that may share an X; 0 for all others.
    """
    rows = torch.arange(len(total), device=total.device)
    counted = total > 0
    source = torch.where(counted & (group > 0), rows, -1).cummax(0).values.clamp_min(0)
    reader = ~counted & (group > 0) & (group[source] == group) & counted[source]
    return weight.index_add(0, source, weight.where(reader, 0.0))


def scale_units(part: Tensor, factor: float) -> None:
    """Changes the gradients' rows in place when their unit changed by ``factor`` (a loss scale)."""
    part[1:, [POWER_SUM, STEP_SUM, POWER, STEP_POWER]] *= factor**2
    part[1:, LAST] += torch.tensor(factor).log().item()
