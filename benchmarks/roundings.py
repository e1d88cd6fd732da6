"""Ways to round a gradient to integers, most of which keep on average what nearest rounding sets to zero.

Each takes ``v [R, Q]`` in steps, Q being the contraction, and returns integers as float32, the two next to ``v``. Noise
is a hash of the magnitudes, as in :mod:`lightning_int8.kernels.rounding`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_int8.kernels.reference import block_amax
from lightning_int8.kernels.rounding import data_seed, uniform

Rounding = Callable[[Tensor], Tensor]
# Elements along the contraction that errors are handed on in: the width of a block, so that one program has them.
RUN = 128


def nearest(v: Tensor) -> Tensor:
    """The least error, but all of it in one direction where every element is below half a step."""
    return v.round()


def stochastic(v: Tensor) -> Tensor:
    """Unbiased; the variance is ``f (1 - f)`` for a fraction ``f``, 1/6 on average where nearest has 1/12."""
    return (v + _noise(v, *v.shape)).floor()


def diffused(v: Tensor) -> Tensor:
    """Differences of the rounded running sum: unbiased as :func:`stochastic`, and errors of neighbours cancel.

    ``q_i = floor(S_i + u) - floor(S_(i-1) + u)`` with ``S_i`` the sum of a run up to ``i`` and one ``u`` a run:
    what the rounding of one element left out is added to the next. In a product with ``x`` the errors ``e_i`` meet
    ``x_i - x_(i+1)``, so they weigh less where ``x`` changes slowly along the contraction.
    """
    padded = F.pad(v, (0, -v.shape[1] % RUN)).unflatten(1, (-1, RUN))
    start = _noise(v, *padded.shape[:2])[..., None].double()
    # Float64, as the sums reach thousands where fractions must stay exact.
    sums = (padded.double().cumsum(2) + start).floor()
    return sums.diff(dim=2, prepend=torch.zeros_like(start)).float().flatten(1)[:, : v.shape[1]]


def below(limit: float, rounding: Rounding, v: Tensor) -> Tensor:
    """``rounding`` where ``|v| < limit``, else nearest.

    With a limit of 1 no element below a step is biased, and an even density is rounded without bias up to half a step
    from there. One of 0.5 is not enough: what lies between half a step and a whole one goes up, and what lies below
    keeps its mean, so a row that ends in between grows.
    """
    small = v.abs() < limit
    return torch.where(small, rounding(v.where(small, 0.0)), v.round())


def _noise(v: Tensor, rows: int, columns: int) -> Tensor:
    return uniform(rows, columns, data_seed(block_amax(v, RUN)), v.device)


ROUNDINGS: dict[str, Rounding] = {
    "nearest": nearest,
    "stochastic": stochastic,
    "stochastic below 1": partial(below, 1.0, stochastic),
    "diffused": diffused,
    "diffused below 1": partial(below, 1.0, diffused),
}
