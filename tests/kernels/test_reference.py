"""The ground truth itself, against int64 and float64 arithmetic and by attack."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_int8.kernels import reference
from lightning_int8.kernels.planes import MAX_WGRAD_TOKENS, MIN_SCALE, QuantizedMatrix, fallback_capacity, seed_count
from lightning_int8.kernels.rounding import data_seed, uniform
from tests.assertions import EXACT, assert_close

B = 32


def heavy(rows: int, columns: int) -> torch.Tensor:
    """Rows of different magnitude, with a few blocks of outliers."""
    x = torch.randn(rows, columns) * torch.randn(rows, 1).exp()
    x[rows // 3, columns // 2] = 400.0
    x[-1, 0] = -90.0
    return x


def row_operand(x: torch.Tensor, rate: float = 0.2, block: int = B) -> QuantizedMatrix:
    capacity = reference.block_amax(x, block).numel()
    low, _, high, _, slot, scale, _ = reference.quantize_row(x, None, 0, rate, capacity, block, False, False)
    return QuantizedMatrix(low, high, slot, scale, tuple(x.shape), block)


def integers(a: QuantizedMatrix) -> torch.Tensor:
    """`256·high + low` as int64 ``[R, Q]``, put together here from the tiles one by one."""
    q = a.low[:, : a.size[1]].long()
    for (i, j), slot in zip(
        torch.cartesian_prod(*map(torch.arange, a.slot.shape)).tolist(), a.slot.flatten(), strict=True
    ):
        if slot >= 0:
            part = q[i * a.block : (i + 1) * a.block, j * a.block : (j + 1) * a.block]
            part += 256 * a.high[slot][: part.shape[0], : part.shape[1]].long()
    return q


# --- which blocks fall back ---


def test_slots_count_in_row_major_order():
    mask = torch.tensor([[False, True, True], [True, False, True]])
    assert reference.slots(mask).tolist() == [[-1, 0, 1], [2, -1, 3]]


def test_the_first_threshold_comes_from_the_data():
    amax = torch.arange(10.0).view(2, 5)
    state = torch.tensor([[math.nan, 0.0, 0.0, math.nan]])
    mask = reference.fallback_mask(amax, state, 0, 0.3, 10, True)
    assert mask.flatten().nonzero().flatten().tolist() == [7, 8, 9]
    assert state[0, :3].tolist() == [6.0, 3.0, 10.0]
    # The next one is measured against it.
    assert reference.fallback_mask(amax + 1, state, 0, 0.3, 10, True).sum() == 4
    assert state[0, :3].tolist() == [6.0, 7.0, 20.0]
    reference.fallback_mask(amax + 5, state, 0, 0.3, 10, False)
    assert state[0, :3].tolist() == [6.0, 7.0, 20.0]


def test_zeros_seed_no_threshold():
    state = torch.tensor([[math.nan, 0.0, 0.0, math.nan]])
    assert not reference.fallback_mask(torch.zeros(2, 2), state, 0, 0.5, 4, True).any()
    assert state[0, 0].isnan()
    assert state[0, 2] == 4


def test_capacity_keeps_the_largest():
    amax = torch.tensor([[5.0, 1.0, 4.0], [3.0, 2.0, 6.0]])
    state = torch.tensor([[0.5, 0.0, 0.0, math.nan]])
    mask = reference.fallback_mask(amax, state, 0, 0.2, 2, True)
    assert mask.tolist() == [[True, False, False], [False, False, True]]
    # The rate that moves the threshold is what exceeded it, not what had room.
    assert state[0, 1] == 6
    tied = reference.fallback_mask(torch.ones(2, 3), torch.tensor([[0.5, 0.0, 0.0, 0.0]]), 0, 0.2, 2, False)
    assert tied.sum() == 0


def test_blocks_that_are_not_finite_do_not_fall_back():
    amax = torch.tensor([[math.inf, math.nan, 3.0, 1.0]])
    state = torch.tensor([[0.5, 0.0, 0.0, math.nan]])
    assert reference.fallback_mask(amax, state, 0, 0.2, 4, True).tolist() == [[False, False, True, True]]
    assert state[0, :3].tolist() == [0.5, 2.0, 2.0]


def test_capacity_and_seed_counts():
    assert seed_count(10, 0.25) == 3
    assert seed_count(10, 1.0) == 10
    assert fallback_capacity(100, (0.1, 0.3)) == 38
    assert fallback_capacity(4, (0.9, 1.0)) == 4


# --- row scaling ---


@pytest.mark.strict
@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_row_integers_are_the_float64_ones(rate):
    x = heavy(70, 100)
    a = row_operand(x, rate)
    q = integers(a)
    inverse = (1.0 / a.scale.double()).float().double()
    # The product of two float32 is exact in float64, so this rounds once to float32 as the reference does.
    v = (x.double() * inverse[:, None]).float().double()
    assert torch.equal(q, v.round().long())
    mask = (a.slot >= 0).repeat_interleave(B, 0)[:70].repeat_interleave(B, 1)[:, :100]
    assert (q[~mask].abs() <= 127).all()
    assert q.abs().max() <= 32512
    error = (x.double() - q * a.scale.double()[:, None]).abs()
    assert (error <= a.scale.double()[:, None] * (0.5 + 1e-2)).all()


@pytest.mark.strict
def test_the_integer_product_is_the_int64_one():
    a, b = row_operand(heavy(50, 90)), row_operand(heavy(40, 90))
    assert (a.slot >= 0).any()
    assert (b.slot >= 0).any()
    assert torch.equal(reference.integer_product(a, b).long(), integers(a) @ integers(b).t())


def test_gemm_row():
    x, w, bias, old = heavy(50, 90), torch.randn(40, 90), torch.randn(40), torch.randn(50, 40)
    a, b = row_operand(x), row_operand(w, 0.0)
    exact = (integers(a) * a.scale.double()[:, None]) @ (integers(b) * b.scale.double()[:, None]).t()
    assert_close("Y", exact + bias + old, reference.gemm_row(a, b, bias, torch.float32, old), 120)
    assert_close("Y", x.double() @ w.double().t(), reference.gemm_row(a, b, None, torch.float32), 35)


@pytest.mark.strict
def test_transposed_planes_are_the_transposed_integers():
    x = heavy(70, 100)
    low, low_t, high, high_t, slot, scale, int_max = reference.quantize_row(x, None, 0, 0.2, 12, B, False, True)
    a = QuantizedMatrix(low, high, slot, scale, (70, 100), B)
    t = QuantizedMatrix(low_t, high_t, slot.t(), None, (100, 70), B)
    assert torch.equal(integers(a).t(), integers(t))
    assert torch.equal(integers(a).abs().amax(1).float(), int_max)
    assert (low[:, 100:] == 0).all()
    assert (low_t[:, 70:] == 0).all()


@pytest.mark.strict
def test_int32_does_not_overflow_in_the_forward():
    # Without the bound, integers of 32512 against 127 pass 2^31 from 521 columns on.
    x = torch.full((3, 4096), 1e30)
    x[1] = 1.0
    x[2, ::2] = -1e-30
    x[:, 5] *= 1.5
    scale = reference.row_scale(x, torch.ones(1, 128, dtype=torch.bool), B, None, folded=False)
    q = reference.row_integers(x, scale, torch.ones(1, 128, dtype=torch.bool), B, None).long()
    worst = q.abs().sum(1) * 127
    assert (worst < 2**31).all()
    assert worst.max() > 0.9 * 2**31, "the bound gives away more than it has to"


@pytest.mark.strict
@pytest.mark.parametrize("tokens", [1024, MAX_WGRAD_TOKENS])
def test_int32_does_not_overflow_in_the_wgrad(tokens):
    # Both operands with high bytes in every block, and everything at its largest.
    other = torch.full((tokens,), 32512.0)
    dy = torch.full((2, tokens), 3e38)
    dy[1] = 1e-20
    mask = torch.ones(1, tokens // B, dtype=torch.bool)
    scale = reference.row_scale(dy, mask, B, other, folded=False)
    for noise in (None, torch.full_like(dy, 1 - 2**-24)):
        q = reference.row_integers(dy, scale, mask, B, noise).long()
        worst = (q.abs() * 32512).sum(1)
        assert (worst < 2**31).all()
    # The GEMM's shifted levels wrap within INT32 and end at the exact sum.
    g = QuantizedMatrix(*(p for p in _planes(q[1:2])), None, (1, tokens), B)
    x = QuantizedMatrix(*(p for p in _planes(torch.full((1, tokens), 32512))), None, (1, tokens), B)
    assert torch.equal(reference.integer_product(g, x).long(), integers(g) @ integers(x).t())


def _planes(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    low, high = reference.split_bytes(q.to(torch.int16))
    slot = torch.arange(q.shape[1] // B, dtype=torch.int32)[None]
    return low, reference._gather_blocks(high, slot, slot.numel(), B), slot


@pytest.mark.strict
def test_every_byte_pair_splits():
    q = torch.arange(-32512, 32513).to(torch.int16)
    low, high = reference.split_bytes(q)
    assert torch.equal(256 * high.long() + low.long(), q.long())
    assert high.min() == -127
    assert high.max() == 127


def test_a_row_of_fallback_blocks_keeps_a_scale_that_folds():
    x = torch.randn(32, 64)
    mask = torch.ones(1, 2, dtype=torch.bool)
    least = reference.row_block_amax(x, B).amin(1)
    torch.testing.assert_close(reference.row_scale(x, mask, B, None, folded=True), least / 127)
    assert (reference.row_scale(x, mask, B, None, folded=False) < least / 200).all()


def test_rows_that_are_not_finite_say_so_in_their_scale_alone():
    x = torch.randn(40, 40)
    x[3, 7], x[5, 1], x[8] = math.nan, math.inf, 0.0
    a = row_operand(x)
    assert a.scale[3].isnan()
    assert a.scale[5].isinf()
    assert a.scale[8] == MIN_SCALE
    assert (integers(a)[[3, 5, 8]] == 0).all()
    assert integers(a)[[0, 1, 2, 4, 6, 7]].abs().amax(1).min() > 0
    y = reference.gemm_row(a, row_operand(torch.randn(8, 40), 0.0), None, torch.float32)
    assert y.isnan().any(1).tolist() == [i in (3, 5) for i in range(40)]


@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e30])
def test_extreme_magnitudes(size):
    x = torch.randn(33, 65) * size
    a = row_operand(x)
    assert a.scale.isfinite().all()
    if size > 1e-30:
        assert_close("x", x, (integers(a) * a.scale[:, None].double()), 35)
    else:
        assert (integers(a) == 0).all()


def test_the_gradient_folds_both_ways():
    dy, t, s = heavy(70, 50), torch.rand(50) + 0.5, torch.rand(70) + 0.5
    out = reference.quantize_row_gradient(dy, t, s, torch.full((70,), 127.0), None, 0.2, 6, B, False, "nothing", True)
    a = QuantizedMatrix(*out[:4], (70, 50), B)
    g = QuantizedMatrix(*out[4:8], (50, 70), B)
    assert_close("A", dy * t, integers(a) * a.scale.double()[:, None], 35)
    assert_close("G", (dy * s[:, None]).t(), integers(g) * g.scale.double()[:, None], 35)
    assert_close("dbias", dy.double().sum(0), out[8], 100)
    nothing = reference.quantize_row_gradient(dy, None, None, None, None, 0.2, 6, B, False, "nothing", False)
    assert all(t.numel() == 0 for t in nothing)


# --- block scaling ---


def test_block_planes_hold_16_bits_where_they_fall_back():
    x = heavy(70, 100)
    low, low_t, high, high_t, slot, scale = reference.quantize_block(x, None, 0, 0.25, 12, B, False, True, "nothing")
    spread = scale.repeat_interleave(B, 0)[:70].repeat_interleave(B, 1)[:, :100].double()
    mask = (slot >= 0).repeat_interleave(B, 0)[:70].repeat_interleave(B, 1)[:, :100]
    base = low[:, :100].double() * spread
    assert ((x - base).abs() <= spread * 0.50001).all()
    residual = integers(QuantizedMatrix(torch.zeros_like(low), high, slot, None, (70, 100), B)) / 256
    error = (x - base - residual * spread / 254).abs()
    assert (error[mask] <= spread[mask] * 0.50001 / 254 + 1e-6 * spread[mask] * 127).all()
    assert torch.equal(low_t[:, :70], low[:, :100].t())
    assert torch.equal(high_t, high.mT)


def test_gemm_block():
    x, w, bias = heavy(50, 90), heavy(40, 90), torch.randn(40)
    a, b = (
        QuantizedMatrix(low, high, slot, scale, size, B)
        for size, (low, _, high, _, slot, scale) in (
            ((n, 90), reference.quantize_block(m, None, 0, 0.3, 9, B, False, False, "nothing"))
            for n, m in ((50, x), (40, w))
        )
    )
    assert_close("Y", x.double() @ w.double().t() + bias, reference.gemm_block(a, b, bias, torch.float32), 35)


def test_blocks_that_are_not_finite_say_so_in_their_scale():
    x = torch.randn(64, 64)
    x[0, 0], x[40, 40] = math.nan, math.inf
    low, _, _, _, _, scale = reference.quantize_block(x, None, 0, 0.2, 4, B, False, False, "nothing")
    assert scale[0, 0].isnan()
    assert scale[1, 1].isinf()
    assert (low[:32, :32] == 0).all()
    assert (low[32:, 32:] == 0).all()


# --- stochastic rounding ---


def test_stochastic_rounding_is_unbiased_and_replays():
    # One value almost everywhere, so that what rounds up is a proportion: 10.3 steps.
    x = torch.full((256, 256), 10.3)
    x[0] = x[:, 0] = 127.0
    arguments = x, torch.ones(256), torch.ones(256), torch.ones(256), None, 0.0, 0, B, False
    stochastic = reference.quantize_row_gradient(*arguments, "all", False)
    for low in (stochastic[0][1:, 1:], stochastic[4][1:, 1:]):
        assert set(low.unique().tolist()) == {10, 11}
        # Five standard deviations.
        assert abs(low.double().mean() - 10.3) < 5 * math.sqrt(0.21 / low.numel())
    nearest, rounded = (reference.quantize_row_gradient(*arguments, which, False) for which in ("nothing", "small"))
    # 10.3 steps are no small values.
    assert all(torch.equal(a, b) for a, b in zip(rounded, nearest, strict=True))
    small = torch.full((256, 256), 0.3)
    small[0] = small[:, 0] = 127.0
    nearest, rounded = (
        reference.quantize_row_gradient(small, *arguments[1:], which, False) for which in ("nothing", "small")
    )
    assert torch.equal(rounded[0], nearest[0])
    assert not nearest[4][1:, 1:].any()
    assert abs(rounded[4][1:, 1:].double().mean() - 0.3) < 5 * math.sqrt(0.21 / rounded[4].numel())
    block = reference.quantize_block(small, None, 0, 0.5, 0, B, False, False, "small")[0][1:, 1:32].double()
    assert abs(block.mean() - 0.3) < 5 * math.sqrt(0.21 / block.numel())
    again = reference.quantize_row_gradient(*arguments, "all", False)
    assert all(torch.equal(a, b) for a, b in zip(stochastic, again, strict=True))
    block = reference.quantize_block(x, None, 0, 0.5, 0, B, False, False, "all")[0][1:, 1:32].double()
    assert abs(block.mean() - 10.3) < 5 * math.sqrt(0.21 / block.numel())


def test_noise_depends_on_data_and_place():
    amax = torch.tensor([[1.0, 2.0], [3.0, math.nan]])
    assert data_seed(amax) == data_seed(amax.t())
    assert data_seed(amax) != data_seed(amax + 1)
    assert data_seed(torch.tensor([1.0, math.inf])) == data_seed(torch.tensor([1.0, math.nan]))
    noise = uniform(300, 200, 12345, torch.device("cpu"))
    assert noise.min() >= 0
    assert noise.max() < 1
    assert abs(noise.mean() - 0.5) < 0.01
    for a, b in ((noise[:, :-1], noise[:, 1:]), (noise[:-1], noise[1:]), (noise[:-1, :-1], noise[1:, 1:])):
        assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) < 0.02
    # Each row and each column on its own: a variance of 1/12, and means as far apart as chance has them.
    for axis, count in ((1, 200), (0, 300)):
        assert (noise.var(axis) - 1 / 12).abs().max() < 0.02
        assert 0.8 < noise.mean(axis).std() / (1 / 12 / count) ** 0.5 < 1.2
    assert abs(torch.corrcoef(torch.stack([noise.flatten(), uniform(300, 200, 12346, "cpu").flatten()]))[0, 1]) < 0.02
    assert_close("first rows", noise[:10], uniform(10, 200, 12345, torch.device("cpu")), EXACT)
