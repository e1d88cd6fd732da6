"""The ground truth of Hadamard transforms: over tokens, for the wgrad, and over features, for the forward.

``dW = dYᵀ X`` is a sum over tokens, so an orthogonal transform of the tokens, the same for dY and X, leaves it as it
is: ``(R dY)ᵀ (R X) = dYᵀ X``. Each value of ``R x`` holds a share of 128 tokens, large and small ones, so that one
scale a feature and 8 bits are enough without fallback.

``Y = X Wᵀ`` is a sum over in-features, and the same holds for them: ``(X Rᵀ) (W Rᵀ)ᵀ = X Wᵀ``. A feature with large
values is spread over 128 of them in each token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_int8.kernels.hadamard_ops import TOKENS, padded_tokens
from lightning_int8.kernels.planes import INT8_MAX, MIN_SCALE, padded
from lightning_int8.kernels.reference import _over, quantize_row, quantize_row_gradient
from lightning_int8.kernels.swiglu_reference import swiglu_row


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
    """``x Rᵀ``: X or W as the forward contracts over its features, to be quantized by rows.

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


def quantize_hadamard(x: Tensor, up: Tensor | None, block: int) -> tuple[Tensor, Tensor]:
    """Quantizes ``R x`` to 8 bits with one scale a column over all tokens: X or dY as the wgrad's operand.

    Rows are padded with zeros, and each 128 adjacent ones transformed by the orthogonal ``R = H·D / sqrt(128)``.
    Products of two such operands cannot overflow INT32 up to ``planes.MAX_WGRAD_TOKENS`` tokens.

    The sums of 128 values are float32, and a kernel may take them in another order: scales differ by up to about
    1e-6 of themselves, and integers by one where a value lies that near to a tie.

    Args:
        x: float ``[M, Q]``, any strides.
        up: ``None``, or like ``x``: what is transformed is ``silu(x)·up``, as PyTorch rounds it in the dtype of ``x``.
        block: Block edge of the wgrad.

    Returns:
        ``low_t`` int8 ``[Q, M']`` with ``M' = padded_tokens(M, block)``, contiguous, and ``scale`` float32 ``[Q]``:
        ``low_t·scale`` is about ``(R x)ᵀ``. A column with NaN or infinity has one of them as its scale, and integers 0.
    """
    if up is not None:
        x = F.silu(x) * up
    rows, columns = x.shape
    mixed = transform(F.pad(x.float(), (0, 0, 0, padded_tokens(rows, block) - rows)))
    if mixed.numel() == 0:
        return mixed.t().to(torch.int8).contiguous(), mixed.new_full((columns,), MIN_SCALE)
    scale = (_over(mixed.abs().amax(0), INT8_MAX) * TOKENS**0.5).clamp_min(MIN_SCALE)
    q = (mixed * (TOKENS**0.5 / scale)).round_().nan_to_num_(0.0).to(torch.int8)
    return q.t().clone(memory_format=torch.contiguous_format), scale


def quantize_row_hadamard(
    x: Tensor, state: Tensor | None, operand: int, seed_rate: float, capacity: int, block: int, update: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`reference.quantize_row` without transposed planes, for the forward, and `quantize_hadamard`, for the wgrad.

    Returns:
        ``low``, ``high``, ``slot`` and ``scale`` of the one, ``low_t`` and ``scale`` of the other.
    """
    low, _, high, _, slot, scale, _ = quantize_row(x, state, operand, seed_rate, capacity, block, update, False)
    return low, high, slot, scale, *quantize_hadamard(x, None, block)


def swiglu_row_hadamard(
    gate: Tensor,
    up: Tensor,
    state: Tensor | None,
    operand: int,
    seed_rate: float,
    capacity: int,
    block: int,
    update: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``h`` of `swiglu_reference.swiglu_row`, and `quantize_row_hadamard` of it."""
    h, low, _, high, _, slot, scale, _ = swiglu_row(gate, up, state, operand, seed_rate, capacity, block, update, False)
    return h, low, high, slot, scale, *quantize_hadamard(h, None, block)


def quantize_row_mixed(
    x: Tensor,
    state: Tensor | None,
    operand: int,
    seed_rate: float,
    capacity: int,
    block: int,
    update: bool,
    wgrad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`reference.quantize_row` of `mix_features`, for the forward, and `quantize_hadamard` of ``x``, for the wgrad.

    The transformed features are quantized from float32. Scales differ between kernels by up to about 1e-6 of
    themselves, and integers by one where a value lies that near to a tie.

    Returns:
        ``low``, ``high``, ``slot`` and ``scale`` of the one; ``low_t`` and ``scale`` of the other, or empty unless
        ``wgrad``.
    """
    mixed = mix_features(x)
    low, _, high, _, slot, scale, _ = quantize_row(mixed, state, operand, seed_rate, capacity, block, update, False)
    if wgrad:
        return low, high, slot, scale, *quantize_hadamard(x, None, block)
    return low, high, slot, scale, low.new_empty(0), scale.new_empty(0)


def swiglu_row_mixed(
    gate: Tensor,
    up: Tensor,
    state: Tensor | None,
    operand: int,
    seed_rate: float,
    capacity: int,
    block: int,
    update: bool,
    wgrad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``h = silu(gate)·up`` in the dtype of ``gate``, and `quantize_row_mixed` of it."""
    h = F.silu(gate) * up
    return h, *quantize_row_mixed(h, state, operand, seed_rate, capacity, block, update, wgrad)


def quantize_weight_mixed(weight: Tensor, block: int, transposed: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W for the forward with its features mixed, and for the dgrad as it is, both without fallback.

    Args:
        weight: float ``[N, K]``, any strides.
        block: Block edge.
        transposed: Whether the integers for the dgrad are wanted, and not their scales alone.

    Returns:
        ``low`` int8 ``[N, K']`` and ``scale`` float32 ``[N]`` of `reference.quantize_row` of `mix_features`;
        ``plain_scale`` float32 ``[N]`` and ``low_t`` int8 ``[K, NB·B]`` of `reference.quantize_row` of ``weight``,
        ``low_t`` empty unless ``transposed``.
    """
    low, *_, scale, _ = quantize_row(mix_features(weight), None, 0, 0.0, 0, block, False, False)
    _, low_t, _, _, _, plain_scale, _ = quantize_row(weight, None, 0, 0.0, 0, block, False, transposed)
    return low, scale, plain_scale, low_t


def quantize_row_gradient_hadamard(
    dy: Tensor,
    weight_scale: Tensor,
    state: Tensor | None,
    seed_rate: float,
    capacity: int,
    block: int,
    update: bool,
    bias: bool,
    statistics: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A of `reference.quantize_row_gradient`, to nearest, for the dgrad, and `quantize_hadamard`, for the wgrad.

    Returns:
        A's ``low``, ``high``, ``slot`` and ``scale``, ``dbias``, ``low_t`` and ``scale`` of the other.
    """
    low, high, slot, scale, *_, dbias = quantize_row_gradient(
        dy, weight_scale, None, None, state, seed_rate, capacity, block, update, "nothing", bias, statistics
    )
    return low, high, slot, scale, dbias, *quantize_hadamard(dy, None, block)
