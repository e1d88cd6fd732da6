"""What changes to the `row` and `block` schemes would gain in accuracy: each simulated on a trained model's operands.

`python -m benchmarks.levers --config config.yaml --ckpt weights.pt --samples 8`: options and output of
`lightning-int8-probe`, whose methods are then the levers. Blocks fall back by their rank, at exactly the rate, where
training's thresholds lag behind by a step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

from benchmarks.roundings import ROUNDINGS, Rounding, nearest
from lightning_int8 import probe_cli
from lightning_int8.float8 import float8_linear
from lightning_int8.kernels.hadamard_ops import TOKENS
from lightning_int8.kernels.hadamard_reference import transform
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
        rounding_dx: How dY is rounded for the dgrad: a key of :data:`benchmarks.roundings.ROUNDINGS`.
        rounding_dw: The same for the wgrad.
        dither: Whether the wgrad's operand is rounded with a number added to every token that is subtracted again after
            the product, where it is a matrix of rank one.
        center: Whether the sum over tokens of the wgrad operand's rounding errors, times the mean over tokens of X's
            integers, is taken off dW: a matrix of rank one, by which the errors meet X without its mean.
        hadamard: Tokens that the Hadamard transform of :mod:`lightning_int8.kernels.hadamard_reference` mixes in both
            operands of the wgrad, X being quantized anew: 128, or fewer.
        features: Whether the transform over 128 mixes the contraction's features in both operands of the forward and of
            the dgrad, W being quantized for each.
        sort: Whether the wgrad's tokens come in the order of their ``‖dY_t‖``, so that groups hold tokens alike.
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
    rounding_dx: str = "nearest"
    rounding_dw: str = "nearest"
    dither: bool = False
    center: bool = False
    hadamard: int | None = None
    features: bool = False
    sort: bool = False


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
    "groups of 512": Levers(group=512),
    "groups of 256": Levers(group=256),
    "64×64 blocks, groups of 1024": Levers(block=(64, 64), group=1024),
    "dY 0.3, groups of 1024": Levers(rate_dy=0.3, group=1024),
    "X 0.4, groups of 1024": Levers(rate_x=0.4, group=1024),
    "sorted, groups of 1024": Levers(group=1024, sort=True),
    "sorted, groups of 256": Levers(group=256, sort=True),
    "dither": Levers(dither=True),
    "dither, groups of 1024": Levers(dither=True, group=1024),
    "Hadamard over 128": Levers(hadamard=128),
    **{
        f"Hadamard over {tokens}, no fallback": Levers(rate_x=0, rate_dy=0, hadamard=tokens)
        for tokens in (16, 32, 64, 128)
    },
    "features and tokens mixed": Levers(features=True, hadamard=128, rate_x=0, rate_dy=0),
    "features and tokens mixed, 0.1": Levers(features=True, hadamard=128, rate_x=0.1, rate_dy=0.1),
    **{f"dW {name}": Levers(rounding_dw=name) for name in ROUNDINGS if name != "nearest"},
    "dX stochastic, dW stochastic": Levers(rounding_dx="stochastic", rounding_dw="stochastic"),
    "dX stochastic below 1": Levers(rounding_dx="stochastic below 1"),
    "centered": Levers(center=True),
    **{
        f"dW {name}, groups of 1024": Levers(rounding_dw=name, group=1024)
        for name in ("stochastic", "stochastic below 1", "diffused", "diffused below 1")
    },
}


def quantize(
    x: Tensor,
    rate: float,
    block: tuple[int, int],
    group: int | None = None,
    folded: bool = False,
    rounding: Rounding = nearest,
) -> tuple[Tensor, Tensor]:
    """Integers of ``x [R, Q]``, of 16 bits where a block falls back, and their scales ``[R, Q]``.

    With ``folded`` a row's scale is at least what the least of its blocks needs, as in
    :func:`lightning_int8.kernels.reference.row_scale`.
    """
    parts, tiles = _block_amax(x, block)
    mask = _spread(_largest(tiles, rate), x, block)
    whole = x.shape[1] if group is None else group
    grouped, plain = (
        F.pad(y, (0, -y.shape[1] % whole)).unflatten(1, (-1, whole)).abs().amax(2)
        for y in (x, x.masked_fill(mask, 0.0))
    )
    if folded:
        plain = torch.maximum(plain, parts.amin(1)[: x.shape[0], None])
    scale = torch.maximum(plain / 127, grouped / 32512).clamp_min(2.0**-100)
    scale = scale.repeat_interleave(whole, 1)[:, : x.shape[1]]
    return rounding(x / scale), scale


def quantize_blocks(x: Tensor, rate: float, rounding: Rounding = nearest) -> tuple[Tensor, Tensor]:
    """:func:`quantize` for the `block` scheme: one scale a block of 128×128, a 254th of it where a block falls back."""
    _, tiles = _block_amax(x, (128, 128))
    step = (tiles / 127).clamp_min(2.0**-100)
    scale = _spread(torch.where(_largest(tiles, rate), step / 254, step), x, (128, 128))
    return rounding(x / scale), scale


def _block_amax(x: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Of the rows of each block, ``[RB·rows, QB]``, and of each block, ``[RB, QB]``."""
    rows, columns = block
    padded = F.pad(x, (0, -x.shape[1] % columns, 0, -x.shape[0] % rows))
    parts = padded.abs().unflatten(1, (-1, columns)).amax(2)
    return parts, parts.unflatten(0, (-1, rows)).amax(1)


def _largest(tiles: Tensor, rate: float) -> Tensor:
    """Which blocks fall back, bool ``[RB, QB]``."""
    high = torch.zeros_like(tiles, dtype=torch.bool)
    if count := int(rate * tiles.numel()):
        high.view(-1)[tiles.flatten().topk(count).indices] = True
    return high


def _spread(blocks: Tensor, x: Tensor, block: tuple[int, int]) -> Tensor:
    """A value of each block for each of its elements, in the shape of ``x``."""
    rows, columns = block
    return blocks.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[: x.shape[0], : x.shape[1]]


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
        left, right = x / e, weight * e
        if levers.features:
            left, right = _mixed(left.t()).t(), _mixed(right.t()).t()
        q_x, s = quantize(left, levers.rate_x, levers.block, folded=True)
        q_w, t = quantize(right, levers.rate_w, levers.block, folded=True)
        ctx.save_for_backward(x, weight, q_x, s[:, :1], q_w, t[:, :1], e)
        ctx.levers = levers
        ctx.shape = shape
        return ((q_x * s) @ (q_w * t).t()).unflatten(0, shape[:-1])

    @staticmethod
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, q_x, s, q_w, t, e = ctx.saved_tensors
        levers = ctx.levers
        dy = dy.flatten(0, -2).float()
        folded = dy * t.t()
        if levers.features:
            folded = _mixed(dy.t()).t()
            q_w = torch.mul(*quantize(_mixed(weight * e).t(), levers.rate_w, levers.block)).t()
        q, scale = quantize(folded, levers.rate_dy, levers.block, rounding=ROUNDINGS[levers.rounding_dx])
        dx = (q * scale) @ q_w / e
        dw = _mixed_wgrad(dy, x / e, levers) if levers.hadamard else _wgrad(dy, q_x, s, levers)
        return dx.view(ctx.shape), dw * e, None


def _wgrad(dy: Tensor, q_x: Tensor, s: Tensor, levers: Levers) -> Tensor:
    """DW from dY ``[M, N]``, X's integers ``[M, K]`` and their scales ``[M, 1]``."""
    if levers.sort:
        order = dy.norm(dim=1).argsort()
        dy, q_x, s = dy[order], q_x[order], s[order]
    folded = (dy * s).t()
    spikes = torch.zeros_like(s[:, 0], dtype=torch.bool)
    if levers.spikes is not None:
        spikes = s[:, 0] > levers.spikes * s.median()
    rounding = _dithered if levers.dither else ROUNDINGS[levers.rounding_dw]
    block = levers.block[::-1]
    q, scale = quantize(folded.masked_fill(spikes, 0.0), levers.rate_dy, block, levers.group, rounding=rounding)
    dw = (q * scale) @ q_x + folded[:, spikes] @ q_x[spikes]
    if levers.center:
        dw += torch.outer((folded.masked_fill(spikes, 0.0) - q * scale).sum(1), q_x.mean(0))
    return dw


def _dithered(v: Tensor) -> Tensor:
    """Rounded with a number a token, which is subtracted again: an error of 1/12 whatever ``v`` is."""
    noise = torch.rand(v.shape[1], generator=torch.Generator().manual_seed(0)).to(v) - 0.5
    return (v + noise).round() - noise


def _mixed_wgrad(dy: Tensor, x: Tensor, levers: Levers) -> Tensor:
    """DW from dY ``[M, N]`` and X ``[M, K]``, both transformed along the tokens, with a scale a row of each operand."""
    operands = []
    for operand, rate in ((dy, levers.rate_dy), (x, levers.rate_x)):
        q, scale = quantize(_mixed(operand, levers.hadamard or TOKENS).t(), rate, levers.block[::-1])
        operands.append(q * scale)
    return operands[0] @ operands[1].t()


def _mixed(x: Tensor, size: int = TOKENS) -> Tensor:
    """Each ``size`` adjacent rows of ``x``, with zeros behind its last ones, transformed by an orthogonal matrix."""
    # The transform's first rows and columns are one of fewer tokens.
    matrix = transform(torch.eye(TOKENS, device=x.device))[:size, :size] * (TOKENS / size**0.5)
    mixed = matrix @ F.pad(x, (0, 0, 0, -len(x) % size)).unflatten(0, (-1, size))
    return mixed.flatten(0, 1)


class BlockLinear(torch.autograd.Function):
    """A linear layer whose three products take what :func:`quantize_blocks` returns, at the rates of `block`."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, rounding: Rounding) -> Tensor:
        ctx.shape, ctx.rounding = x.shape, rounding
        x, weight = (torch.mul(*quantize_blocks(y.float(), rate)) for y, rate in ((x.flatten(0, -2), 0.2), (weight, 0)))
        ctx.save_for_backward(x, weight)
        return (x @ weight.t()).unflatten(0, ctx.shape[:-1])

    @staticmethod
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        dy = torch.mul(*quantize_blocks(dy.flatten(0, -2).float(), 0.2, ctx.rounding))
        return (dy @ weight).view(ctx.shape), dy.t() @ x, None


def _with_bias(function: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None, variant: Any) -> Tensor:
    y = function(x, weight, variant)
    return y if bias is None else y + bias


def methods() -> dict[str, Method]:
    """The variants, and FP8 rowwise."""
    found: dict[str, Method] = {
        name: partial(_with_bias, LeveredLinear.apply, variant=levers) for name, levers in VARIANTS.items()
    }
    for name, rounding in ROUNDINGS.items():
        found[f"block, {name}"] = partial(_with_bias, BlockLinear.apply, variant=rounding)
    found["float8 rowwise"] = partial(float8_linear, scaling="rowwise")
    return found


def main(argv: list[str] | None = None) -> ProbeResult:
    """Runs the probe with the levers as its methods."""
    return probe_cli.main(argv, methods())


if __name__ == "__main__":
    main()
