"""What changes to the `row` scheme would gain in accuracy: each simulated on real operands of a trained model.

`python -m benchmarks.levers --config config.yaml --ckpt weights.pt --samples 8`: options and output of
`lightning-int8-probe`, whose methods are then the levers. Blocks fall back by their rank, at exactly the rate, where
training's thresholds lag behind by a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

from lightning_int8 import probe_cli
from lightning_int8.float8 import float8_linear
from lightning_int8.probe import Method, ProbeResult


@dataclass(frozen=True)
class Levers:
    """A variant of the `row` scheme.

    Attributes:
        rate_x: Share of X's blocks that fall back.
        rate_dy: Share of dY's blocks that fall back, in both of its operands.
        rate_w: Share of W's blocks that fall back.
        block: Rows and columns of a block; those of the wgrad's operand are turned.
        group: Tokens that share a scale in the wgrad's operand; ``None``: all of them.
        equalize: Exponent ``a`` of ``e = amax(X)^a / amax(W)^(1 - a)`` by channel, by which X is divided and W
            multiplied; ``None``: no equalization.
        spikes: Tokens whose scale is more than this times the median go into dW in full precision, and do not count in
            the wgrad's scales.
    """

    rate_x: float = 0.2
    rate_dy: float = 0.2
    rate_w: float = 0.0
    block: tuple[int, int] = (128, 128)
    group: int | None = None
    equalize: float | None = None
    spikes: float | None = None


VARIANTS = {
    "row 0.2": Levers(),
    "row 0.1": Levers(rate_x=0.1, rate_dy=0.1),
    "no fallback": Levers(rate_x=0, rate_dy=0),
    "X 0.3, dY 0.1": Levers(rate_x=0.3, rate_dy=0.1),
    "X 0.1, dY 0.3": Levers(rate_x=0.1, rate_dy=0.3),
    "64-row blocks": Levers(block=(64, 128)),
    "64×64 blocks": Levers(block=(64, 64)),
    "groups of 4096": Levers(group=4096),
    "groups of 2048": Levers(group=2048),
    "groups of 1024": Levers(group=1024),
    "W 0.1": Levers(rate_w=0.1),
    "W 0.2": Levers(rate_w=0.2),
    "equalized 0.5": Levers(equalize=0.5),
    "equalized 0.25": Levers(equalize=0.25),
    "spikes > 8": Levers(spikes=8.0),
    "spikes > 3": Levers(spikes=3.0),
    "no fallback, groups of 1024": Levers(rate_x=0, rate_dy=0, group=1024),
    "no fallback, equalized 0.5": Levers(rate_x=0, rate_dy=0, equalize=0.5),
    "0.1, groups of 1024": Levers(rate_x=0.1, rate_dy=0.1, group=1024),
}


def quantize(
    x: Tensor, rate: float, block: tuple[int, int], group: int | None = None, folded: bool = False
) -> tuple[Tensor, Tensor]:
    """Integers of ``x [R, Q]``, of 16 bits where a block falls back, and their scales ``[R, Q]``.

    With ``folded`` a row's scale is at least what the least of its blocks needs, as in
    :func:`lightning_int8.kernels.reference.row_scale`.
    """
    rows, columns = block
    pad = (-x.shape[1] % columns, -x.shape[0] % rows)
    padded = F.pad(x, (0, pad[0], 0, pad[1]))
    parts = padded.abs().unflatten(1, (-1, columns)).amax(2)
    tiles = parts.unflatten(0, (-1, rows)).amax(1)
    high = torch.zeros_like(tiles, dtype=torch.bool)
    if count := int(rate * tiles.numel()):
        high.view(-1)[tiles.flatten().topk(count).indices] = True
    mask = high.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[: x.shape[0], : x.shape[1]]
    whole = x.shape[1] if group is None else group
    grouped, plain = (
        F.pad(y, (0, -y.shape[1] % whole)).unflatten(1, (-1, whole)).abs().amax(2)
        for y in (x, x.masked_fill(mask, 0.0))
    )
    if folded:
        plain = torch.maximum(plain, parts.amin(1)[: x.shape[0], None])
    scale = torch.maximum(plain / 127, grouped / 32512).clamp_min(2.0**-100)
    scale = scale.repeat_interleave(whole, 1)[:, : x.shape[1]]
    return (x / scale).round(), scale


class LeveredLinear(torch.autograd.Function):
    """A linear layer whose three products take what :func:`quantize` returns."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, levers: Levers) -> Tensor:
        shape = x.shape
        x = x.flatten(0, -2).float()
        weight = weight.float()
        e = torch.ones_like(x[0])
        if levers.equalize is not None:
            a = levers.equalize
            e = x.abs().amax(0).clamp_min(1e-12) ** a / weight.abs().amax(0).clamp_min(1e-12) ** (1 - a)
        q_x, s = quantize(x / e, levers.rate_x, levers.block, folded=True)
        q_w, t = quantize(weight * e, levers.rate_w, levers.block, folded=True)
        ctx.save_for_backward(q_x, s[:, :1], q_w, t[:, :1], e)
        ctx.levers = levers
        ctx.shape = shape
        return ((q_x * s) @ (q_w * t).t()).unflatten(0, shape[:-1])

    @staticmethod
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        q_x, s, q_w, t, e = ctx.saved_tensors
        levers = ctx.levers
        dy = dy.flatten(0, -2).float()
        q, scale = quantize(dy * t.t(), levers.rate_dy, levers.block)
        dx = (q * scale) @ q_w / e
        folded = (dy * s).t()
        spikes = torch.zeros_like(s[:, 0], dtype=torch.bool)
        if levers.spikes is not None:
            spikes = s[:, 0] > levers.spikes * s.median()
        q, scale = quantize(folded.masked_fill(spikes, 0.0), levers.rate_dy, levers.block[::-1], levers.group)
        dw = ((q * scale) @ q_x + folded[:, spikes] @ q_x[spikes]) * e
        return dx.view(ctx.shape), dw, None


def levered_linear(x: Tensor, weight: Tensor, bias: Tensor | None, levers: Levers) -> Tensor:
    """A linear layer under these levers."""
    y = LeveredLinear.apply(x, weight, levers)
    return y if bias is None else y + bias


def methods() -> dict[str, Method]:
    """The variants, and FP8 rowwise."""
    found: dict[str, Method] = {name: partial(levered_linear, levers=levers) for name, levers in VARIANTS.items()}
    found["float8 rowwise"] = partial(float8_linear, scaling="rowwise")
    return found


def main(argv: list[str] | None = None) -> ProbeResult:
    """Runs the probe with the levers as its methods."""
    return probe_cli.main(argv, methods())


if __name__ == "__main__":
    main()
