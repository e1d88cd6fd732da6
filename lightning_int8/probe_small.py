"""What a quantization method leaves of small gradients, beside which dY's other tokens are a thousand times larger.

Tokens that the model predicts well have the smallest gradients. Where they share a scale with larger ones, their
elements may all be below half a step: rounded to nearest they vanish, and no SQNR of all of dX or dW shows it, since
the large tokens make nearly all of those. So the tokens with the smallest ``‖dY_t‖``, some half of them, are looked at
alone.

dX has its rows. dW is a sum over tokens, of which a method, a black box, gives only the whole; the share of the small
tokens is half of ``dW(dY) - dW(dY with the small tokens' signs turned)``. AbsMax does not see signs, so both runs have
the same scales, fallback blocks and noise of rounding, and what the large tokens add, errors included, cancels.
(Zeros instead of turned signs would change the scale wherever a small token has a feature's largest element.)
Stochastic rounding rounds the two runs opposite ways from the same noise, so its SQNR reads up to 3 dB too high.

What one linear loses the next never gets, so the same is asked of the whole network: of the tokens whose predictions
have the smallest gradients, how much arrives at the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SmallTokens:
    """The tokens with the smallest gradients.

    Attributes:
        rows: Their indices in dY, int64 ``[S]``. Tokens without any gradient do not count.
        dy_ratio: Root mean square of their ``‖dY_t‖``, over that of all tokens with a gradient.
        dx: What they have of the exact dX, float32 ``[S, K]``.
        dw: What they add to the exact dW, float32 ``[N, K]``.
        dw_ratio: Norm of ``dw`` over that of all of dW.
    """

    rows: Tensor
    dy_ratio: float
    dx: Tensor
    dw: Tensor
    dw_ratio: float

    @classmethod
    def of(cls, share: float, x: Tensor, dy: Tensor, dx: Tensor, dw: Tensor) -> SmallTokens:
        """A ``share`` of the tokens, from X ``[M, K]``, dY ``[M, N]`` and exact dX and dW, all float32."""
        rows = _smallest(dy, share)
        part = dy[rows].t() @ x[rows]
        norms = _norms(dy)
        ratio = norms[rows].square().mean().sqrt() / norms[norms > 0].square().mean().sqrt()
        return cls(rows, float(ratio), dx[rows], part, float(part.norm() / dw.norm()))

    def turned(self, dy: Tensor) -> Tensor:
        """``dy [M, N]`` with the signs of these tokens turned."""
        return _turned(dy, self.rows)


@dataclass(frozen=True)
class SmallPredictions:
    """The tokens whose predictions have the smallest gradients, in a whole network.

    Attributes:
        rows: Their indices among all positions, int64 ``[S]``.
        dw: What they add to the exact gradient of each weight; ``None`` for a weight that they do not reach.
    """

    rows: Tensor
    dw: tuple[Tensor | None, ...]

    @classmethod
    def of(cls, share: float, loss: Tensor, predictions: Tensor, weights: Sequence[Tensor]) -> SmallPredictions:
        """A ``share`` of the tokens, from the graph of ``loss`` over ``predictions [..., C]`` over ``weights``."""
        (gradient,) = torch.autograd.grad(loss, predictions, retain_graph=True)
        flat = gradient.flatten(0, -2)
        rows = _smallest(flat, share)
        part = torch.zeros_like(flat).index_copy(0, rows, flat[rows])
        return cls(rows, _gradients(predictions, weights, part.view_as(gradient)))

    def slopes(self, loss: Tensor, predictions: Tensor, weights: Sequence[Tensor]) -> list[float]:
        """How much of ``dw`` another graph of the same network keeps, by weight: see :func:`slope`."""
        (gradient,) = torch.autograd.grad(loss, predictions, retain_graph=True)
        turned = _turned(gradient.flatten(0, -2), self.rows).view_as(gradient)
        whole = _gradients(predictions, weights, gradient)
        other = _gradients(predictions, weights, turned)
        return [
            float("nan") if want is None or a is None or b is None else slope(want, (a - b) / 2)
            for want, a, b in zip(self.dw, whole, other, strict=True)
        ]


def _gradients(predictions: Tensor, weights: Sequence[Tensor], gradient: Tensor) -> tuple[Tensor | None, ...]:
    """Of the weights; none of none, which autograd refuses."""
    if not weights:
        return ()
    return torch.autograd.grad(predictions, weights, gradient, retain_graph=True, allow_unused=True)


def _smallest(dy: Tensor, share: float) -> Tensor:
    """Which rows of ``dy [M, N]`` are the smallest, those of zeros left out: int64 ``[S]``."""
    norms = _norms(dy)
    order = norms.argsort()
    order = order[norms[order] > 0]
    return order[: int(share * len(order))]


def _norms(dy: Tensor) -> Tensor:
    """Float64, as squares of small gradients may vanish; a few rows at a time, as those of predictions are long."""
    return torch.cat([part.double().norm(dim=1) for part in dy.split(1024)])


def _turned(dy: Tensor, rows: Tensor) -> Tensor:
    return dy.index_copy(0, rows, -dy[rows])


def slope(want: Tensor, got: Tensor) -> float:
    """How much of ``want`` is in ``got``: ``⟨got, want⟩ / ⟨want, want⟩``. 1 if it is kept, 0 if it is lost."""
    want = want.double()
    return float((got.double() * want).sum() / want.square().sum())
