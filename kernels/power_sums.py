"""The mean squares that a fallback budget weighs, in one Triton launch.

Each program sums the squares of some of the sampled rows and of some of the scales; the last one to end adds up what
all have found, always in the same order, so that results are the same in every run. Programs count themselves as
fractions of a measurement, in the state's own count of measurements: nothing has to be zeroed before a launch, nor kept
after it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lightning_int8.kernels.launch import CachedLaunch
from lightning_int8.kernels.power import POWER_COUNT, POWER_SUM, STEP_SUM, sampling
from lightning_int8.kernels.quantize_launch import Allocator, on

# Programs of a launch, a power of two so that its fractions are exact, and fewer than multiprocessors; elements of the
# scales that one takes at a time; columns of ``x``, two rows of them, at most.
_PROGRAMS, _STEPS, _MAX_COLUMNS = 128, 256, 4096
_POWER_SUM, _STEP_SUM, _POWER_COUNT = tl.constexpr(POWER_SUM), tl.constexpr(STEP_SUM), tl.constexpr(POWER_COUNT)


@triton.jit
def _squares(step, count, pid, PROGRAMS: tl.constexpr, STEPS: tl.constexpr):
    """Sum of the squares of every ``PROGRAMS``-th piece of ``step``, contiguous float32 ``[count]``."""
    total = tl.zeros([STEPS], tl.float32)
    for start in range(pid * STEPS, count, PROGRAMS * STEPS):
        i = start + tl.arange(0, STEPS)
        value = tl.load(step + i, mask=i < count, other=0.0)
        total += value * value
    return tl.sum(total, 0)


@CachedLaunch
@triton.jit
def power_sums(
    x,
    column_scale,  # float32 [Q], or None: ones
    row_scale,  # float32 [R], or None where there is no G
    a_step,  # float32, or None: zero
    g_step,
    partials,  # float32 [4, PROGRAMS]: of A, its scales, G, its scales
    state,
    width,  # columns of state
    a_steps,  # elements of a_step
    g_steps,
    distance,
    sampled,
    columns,
    stride_r,
    stride_c,
    A: tl.constexpr,  # row of state for x·diag(column_scale), or -1: no A
    G: tl.constexpr,  # for diag(row_scale)·x
    PROGRAMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Mean squares of the ``sampled`` rows of ``x [R, Q]`` at ``distance``, scaled as A and as G, and of the scales."""
    pid = tl.program_id(0)
    a_power = tl.zeros([ROWS, COLUMNS], tl.float32)
    g_power = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(pid * ROWS, sampled, PROGRAMS * ROWS):
        i = start + tl.arange(0, ROWS)
        r = i.to(tl.int64) * distance
        if G >= 0:
            fold_r = tl.load(row_scale + r, mask=i < sampled, other=0.0)
        for column in range(0, columns, COLUMNS):
            c = column + tl.arange(0, COLUMNS)
            inside = (i < sampled)[:, None] & (c < columns)[None, :]
            offset = (r * stride_r)[:, None] + (c.to(tl.int64) * stride_c)[None, :]
            tile = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
            if A >= 0:
                a = tile
                if column_scale is not None:
                    a = tile * tl.load(column_scale + c, mask=c < columns, other=0.0)[None, :]
                a_power += a * a
            if G >= 0:
                g = tile * fold_r[:, None]
                g_power += g * g
    if A >= 0:
        tl.store(partials + pid, tl.sum(a_power))
        if a_step is not None:
            tl.store(partials + PROGRAMS + pid, _squares(a_step, a_steps, pid, PROGRAMS, STEPS))
    if G >= 0:
        tl.store(partials + 2 * PROGRAMS + pid, tl.sum(g_power))
        tl.store(partials + 3 * PROGRAMS + pid, _squares(g_step, g_steps, pid, PROGRAMS, STEPS))
    tl.debug_barrier()
    first = state + (A if A >= 0 else G) * width
    count = tl.atomic_add(first + _POWER_COUNT, 1.0 / PROGRAMS, sem="acq_rel") + 1.0 / PROGRAMS
    if count == tl.floor(count):
        # All four sums in one load: what comes after the last program's count is the launch's time.
        k = tl.arange(0, 4)
        of_a = k < 2
        of_steps = k % 2 == 1
        wanted = tl.where(of_a, A, G) >= 0
        if a_step is None:
            wanted &= k != 1
        elements = sampled * 1.0 * columns
        size = tl.where(of_steps, tl.where(of_a, a_steps, g_steps).to(tl.float32), elements)
        each = partials + k[:, None] * PROGRAMS + tl.arange(0, PROGRAMS)[None, :]
        # Other multiprocessors have written it, so not from this one's L1 cache.
        total = tl.sum(tl.load(each, mask=wanted[:, None], other=0.0, cache_modifier=".cg"), 1)
        sums = state + tl.where(of_a, A, G) * width + tl.where(of_steps, _STEP_SUM, _POWER_SUM)
        tl.store(sums, tl.load(sums, mask=wanted, other=0.0) + total / size, mask=wanted)
        if A >= 0 and G >= 0:
            other = state + G * width + _POWER_COUNT
            tl.store(other, tl.load(other) + 1.0)


def measure_power(x: Tensor, step: Tensor | None, state: Tensor, operand: int) -> Tensor:
    """See `power_reference.measure_power`; ``step`` and ``state`` are contiguous. Returns its workspace."""
    return _launch(x, None, None, step, None, state, operand, -1)


def measure_gradient_power(
    dy: Tensor,
    weight_scale: Tensor | None,
    input_scale: Tensor | None,
    a_step: Tensor,
    g_step: Tensor,
    state: Tensor,
) -> Tensor:
    """See `power_reference.measure_gradient_power`; all but ``dy`` are contiguous. Returns its workspace."""
    a, g = -1 if weight_scale is None else 1, -1 if input_scale is None else 2
    return _launch(dy, weight_scale, input_scale, a_step, g_step, state, a, g)


def _launch(
    x: Tensor,
    column_scale: Tensor | None,
    row_scale: Tensor | None,
    a_step: Tensor | None,
    g_step: Tensor | None,
    state: Tensor,
    a: int,
    g: int,
) -> Tensor:
    rows, columns = x.shape
    distance, sampled = sampling(rows)
    partials = Allocator(x.device).float32(4, _PROGRAMS)
    with on(x):
        power_sums[(_PROGRAMS,)](
            x, column_scale, row_scale, a_step, g_step, partials, state, state.stride(0),
            0 if a_step is None else a_step.numel(), 0 if g_step is None else g_step.numel(),
            distance, sampled, columns, x.stride(0), x.stride(1), A=a, G=g, PROGRAMS=_PROGRAMS, ROWS=2,
            COLUMNS=min(triton.next_power_of_2(columns), _MAX_COLUMNS), STEPS=_STEPS, num_warps=8,
        )  # fmt: skip
    return partials
