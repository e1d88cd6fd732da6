"""The ground truth of operands whose contraction a Hadamard transform has mixed.

``dW = dYᵀ X`` is a sum over tokens, so an orthogonal transform of the tokens, the same for dY and X, leaves it as it
is: ``(R dY)ᵀ (R X) = dYᵀ X``. Each value of ``R x`` holds a share of 128 tokens, large and small ones, so that one
scale a feature and 8 bits are enough without fallback.

``Y = X Wᵀ`` is a sum over in-features, and the same holds for them: ``(X Rᵀ) (W Rᵀ)ᵀ = X Wᵀ``. A feature with large
values is spread over 128 of them in each token. ``dX = dY W`` is one over out-features: ``(dY Rᵀ) (R W)``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_int8.kernels.hadamard_ops import TOKENS, padded_tokens
from lightning_int8.kernels.planes import INT8_MAX, MIN_SCALE, padded
from lightning_int8.kernels.reference import _over, quantize_row


def signs(device: torch.device) -> Tensor:
    """D's diagonal, float32 ``[128]``: ``(-1)^(b0·b1 + b2·b3 + b4·b5)`` of the bits ``b`` of a token's place.

    A quadratic form, so that what would meet one row of H alone, a constant or any other Walsh function, is spread over
    64 of the 128 places.
    """
    place = torch.arange(TOKENS, device=device)
    pairs = place & (place >> 1) & 0b010101
    return 1.0 - 2.0 * ((pairs ^ (pairs >> 2) ^ (pairs >> 4)) & 1)


def transform(x: Tensor) -> Tensor:
    """``H D x / 128`` of each 128 adjacent rows of float32 ``x [M', Q]``; it is ``R x`` less a factor of ``sqrt(128)``.

    ``H[i, j] = (-1)^popcount(i & j)``. Divided before the sums, which then overflow nowhere.
    """
    mixed = x.unflatten(0, (-1, TOKENS)) * (signs(x.device) / TOKENS)[:, None]
    for bit in range(TOKENS.bit_length() - 1):
        a, b = mixed.unflatten(1, (-1, 2, 1 << bit)).unbind(2)
        mixed = torch.stack([a + b, a - b], 2).flatten(1, 3)
    return mixed.flatten(0, 1)


def mix_features(x: Tensor) -> Tensor:
    """``x Rᵀ``: X, W or dY as a GEMM contracts over its features, to be quantized by rows.

    Columns are padded with zeros, and each 128 adjacent ones transformed by the orthogonal ``R = H·D / sqrt(128)``.
    A kernel may take the float32 sums in another order.

    Args:
        x: float ``[M, Q]``, any strides.

    Returns:
        float32 ``[M, Q']``, ``Q'`` being ``Q`` rounded up to 128, contiguous. NaN and infinities reach all 128
        features.
    """
    columns = x.shape[1]
    mixed = transform(F.pad(x.float(), (0, padded(columns, TOKENS) - columns)).t()) * TOKENS**0.5
    return mixed.t().contiguous()


def quantize_hadamard(x: Tensor, up: Tensor | None, block: int, sums: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Quantizes ``R x`` to 8 bits with one scale a column over all rows: X or dY for the wgrad, or W for the dgrad.

    Rows are padded with zeros, and each 128 adjacent ones transformed by the orthogonal ``R = H·D / sqrt(128)``.
    Products of two such operands cannot overflow INT32 up to ``planes.MAX_WGRAD_TOKENS`` tokens.

    The sums of 128 values are float32, and a kernel may take them in another order: scales differ by up to about
    1e-6 of themselves, and integers by one where a value lies that near to a tie.

    Args:
        x: float ``[M, Q]``, any strides.
        up: ``None``, or like ``x``: what is transformed is ``silu(x)·up``, as PyTorch rounds it in the dtype of ``x``.
        block: Block edge of the wgrad.
        sums: Whether to sum up what is transformed over its rows: the bias gradient, where it is dY.

    Returns:
        ``low_t`` int8 ``[Q, M']`` with ``M' = padded_tokens(M, block)``, contiguous; ``scale`` float32 ``[Q]``:
        ``low_t·scale`` is about ``(R x)ᵀ``; and the sums, float32 ``[Q]``, empty unless ``sums``. A column with NaN or
        infinity has one of them as its scale, and integers 0.
    """
    if up is not None:
        x = F.silu(x) * up
    rows, columns = x.shape
    mixed = transform(F.pad(x.float(), (0, 0, 0, padded_tokens(rows, block) - rows)))
    total = x.sum(0, dtype=torch.float32) if sums else mixed.new_empty(0)
    if mixed.numel() == 0:
        return mixed.t().to(torch.int8).contiguous(), mixed.new_full((columns,), MIN_SCALE), total
    scale = (_over(mixed.abs().amax(0), INT8_MAX) * TOKENS**0.5).clamp_min(MIN_SCALE)
    q = (mixed * (TOKENS**0.5 / scale)).round_().nan_to_num_(0.0).to(torch.int8)
    return q.t().clone(memory_format=torch.contiguous_format), scale, total


def quantize_mixed(
    x: Tensor,
    state: Tensor | None,
    operand: int,
    seed_rate: float,
    capacity: int,
    block: int,
    update: bool,
    columns: bool,
    sums: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Both operands of X, W or dY: `reference.quantize_row` of `mix_features`, and `quantize_hadamard`.

    The transformed features are quantized from float32. Scales differ between kernels by up to about 1e-6 of
    themselves, and integers by one where a value lies that near to a tie.

    Args:
        x: float ``[R, Q]``, any strides.
        state: As `reference.quantize_row` takes it, as are those up to ``update``; thresholds and blocks are of
            transformed features.
        operand: See there.
        seed_rate: See there.
        capacity: See there.
        block: See there.
        update: See there.
        columns: Whether to make the operand of the columns.
        sums: Whether to sum up ``x`` over its rows: the bias gradient, where it is dY. Only with ``columns``.

    Returns:
        ``low`` int8 ``[R, Q']``, ``high``, ``slot`` and ``scale`` float32 ``[R]`` of the rows, ``Q'`` being ``Q``
        rounded up to 128 and to ``block``; ``low_t`` and ``scale_t`` of the columns, empty unless ``columns``; and the
        sums, float32 ``[Q]``, empty unless ``sums``.
    """
    mixed = mix_features(x)
    low, _, high, _, slot, scale, _ = quantize_row(mixed, state, operand, seed_rate, capacity, block, update, False)
    if columns:
        return low, high, slot, scale, *quantize_hadamard(x, None, block, sums)
    return low, high, slot, scale, low.new_empty(0), scale.new_empty(0), scale.new_empty(0)
