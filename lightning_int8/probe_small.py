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
"""

from __future__ import annotations

from dataclasses import dataclass

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
        norms = dy.double().norm(dim=1)
        order = norms.argsort()
        order = order[norms[order] > 0]
        rows = order[: int(share * len(order))]
        part = dy[rows].t() @ x[rows]
        ratio = norms[rows].square().mean().sqrt() / norms[order].square().mean().sqrt()
        return cls(rows, float(ratio), dx[rows], part, float(part.norm() / dw.norm()))

    def turned(self, dy: Tensor) -> Tensor:
        """``dy [M, N]`` with the signs of these tokens turned."""
        return dy.index_copy(0, self.rows, -dy[self.rows])


def slope(want: Tensor, got: Tensor) -> float:
    """How much of ``want`` is in ``got``: ``⟨got, want⟩ / ⟨want, want⟩``. 1 if it is kept, 0 if it is lost."""
    want = want.double()
    return float((got.double() * want).sum() / want.square().sum())
