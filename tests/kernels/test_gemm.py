"""The portable GEMMs against the reference in Triton's interpreter: integer for integer, whatever the operands.

They are collected by a process of its own: see `interpreter`.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.kernels.interpreter import interpreting, run_interpreted

INTERPRETED = interpreting(__file__)

if not INTERPRETED:

    def test_in_the_interpreter():
        run_interpreted(__file__)

else:
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st

    from lightning_int8.kernels import gemm, hopper_groups, portable, reference
    from lightning_int8.kernels.groups import gemm_row_groups
    from lightning_int8.kernels.planes import QuantizedMatrix, blocks_along
    from lightning_int8.kernels.tiles import Tile
    from tests.assertions import EXACT, assert_close
    from tests.kernels.bounds import checked_accesses

    TILES = [Tile(64, 64, 4, 3), Tile(128, 128, 4, 3), Tile(64, 128, 4, 3, 1), Tile(128, 256, 8, 4, 2)]
    # The interpreter casts to bfloat16 by cutting bits off, where the GPU and PyTorch round; in dB.
    TRUNCATED = 42.0
    EXAMPLES = settings(
        max_examples=25,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )

    @pytest.fixture(autouse=True)
    def poison(monkeypatch):
        """Memory that the launchers allocate holds NaN, or integers that make a wild index; nothing else is touched."""
        empty = torch.empty

        def poisoned(*args, **kwargs):
            out = empty(*args, **kwargs)
            return out.fill_(float("nan") if out.is_floating_point() else torch.iinfo(out.dtype).max)

        monkeypatch.setattr(gemm.torch, "empty", poisoned)
        with checked_accesses():
            yield

    def operand(scaling, rows, depth, block, rate, *, transposed=False, scaled=True, seed=0, x=None):
        """A quantized ``[rows, depth]``, without high planes if ``rate`` is ``None``; unused ones are poisoned."""
        generator = torch.Generator().manual_seed(seed)
        if x is None:
            x = torch.randn(rows, depth, generator=generator) * torch.randn(rows, 1, generator=generator).exp()
        x = x.t().contiguous() if transposed else x
        capacity = blocks_along(rows, block) * blocks_along(depth, block)
        if scaling == "row":
            low, low_t, high, high_t, slot, scale, _ = reference.quantize_row(
                x, None, 0, rate or 0.0, capacity, block, False, transposed
            )
            if transposed:
                scale = torch.rand(rows, generator=generator)
        else:
            low, low_t, high, high_t, slot, scale = reference.quantize_block(
                x, None, 0, rate or 0.0, capacity, block, False, transposed, False
            )
        if transposed:
            low, high, slot = low_t, high_t, slot.t()
            scale = scale.t() if scaling == "block" else scale
        high[int((slot >= 0).sum()) :] = -128
        keep = rate is not None
        return QuantizedMatrix(
            low, high if keep else None, slot if keep else None, scale if scaled else None, (rows, depth), block
        )

    def compare(scaling, a, b, bias=None, out_dtype=torch.float32, accumulate=None, tile=None):
        if scaling == "row":
            value = gemm.launch_row(a, b, bias, out_dtype, accumulate, tile or TILES[0])
            wanted = reference.gemm_row(a, b, bias, out_dtype, accumulate)
            assert_close("row", wanted, value, TRUNCATED if out_dtype == torch.bfloat16 else EXACT, check_dtype=True)
        else:
            value = gemm.launch_block(a, b, bias, out_dtype, accumulate, tile or TILES[0])
            wanted = reference.gemm_block(a, b, bias, out_dtype, accumulate)
            # Base blocks and fallback blocks are summed in another order than the reference's.
            sqnr = {torch.float32: 115.0, torch.float16: 66.0, torch.bfloat16: TRUNCATED}[out_dtype]
            assert_close("block", wanted, value, sqnr, check_dtype=True)
        return value

    @pytest.mark.parametrize("group_blocks", [1, 2, 3])
    def test_groups_are_added_up(group_blocks):
        a, b = (operand("row", rows, 150, 32, 0.3, transposed=True, scaled=False) for rows in (70, 40))
        groups = -(-5 // group_blocks)
        a = replace(a, scale=torch.rand(groups, 70))
        value = gemm_row_groups(gemm.gemm_row, a, b, torch.float32, group_blocks)
        assert_close("groups", gemm_row_groups(reference.gemm_row, a, b, torch.float32, group_blocks), value, EXACT)
        # By way of what the integers stand for.
        width = group_blocks * 32
        dense_a, dense_b = (x.low[:, :150].double() + 256 * reference._dense_high(x)[:, :150].double() for x in (a, b))
        scale = a.scale.double().repeat_interleave(width, 0)[:150]
        assert_close("dense", (dense_a * scale.t()) @ dense_b.t(), value, 120)
        with pytest.raises(ValueError, match=rf"each of {groups} groups, not a scale of shape \[7, 70\]"):
            gemm_row_groups(gemm.gemm_row, replace(a, scale=torch.rand(7, 70)), b, torch.float32, group_blocks)

    @pytest.mark.parametrize(("parts", "dtype"), [(1, torch.float32), (3, torch.float16), (8, torch.float32)])
    def test_scaled_parts_are_added(parts, dtype):
        sums = torch.randint(-(2**31), 2**31, (parts, 7, 300), dtype=torch.int64).int()
        scale, before = torch.rand(parts, 7) * 1e-8, torch.randn(7, 300)
        for start in (before, None):
            wanted = torch.zeros(7, 300) if start is None else start.clone()
            for part in range(parts):
                wanted += sums[part].float() * scale[part][:, None]
            out = torch.empty(7, 300, dtype=dtype)
            hopper_groups.scale_and_add(sums, scale, start, out)
            assert_close("sum", wanted.to(dtype), out, EXACT, check_dtype=True)

    @EXAMPLES
    @given(
        rows=st.integers(1, 300),
        columns=st.integers(1, 300),
        depth=st.integers(1, 400),
        block=st.sampled_from([128, 128, 64, 32]),
        rates=st.tuples(*[st.sampled_from([None, 0.0, 0.3, 1.0])] * 2),
        transposed=st.tuples(st.booleans(), st.booleans()),
        scaled=st.booleans(),
        epilogue=st.tuples(st.booleans(), st.booleans()),
        out_dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
        tile=st.sampled_from(TILES),
        scaling=st.sampled_from(["row", "block"]),
    )
    def test_any_shape(rows, columns, depth, block, rates, transposed, scaled, epilogue, out_dtype, tile, scaling):
        scaled = scaled or scaling == "block" or out_dtype == torch.float16
        a = operand(scaling, rows, depth, block, rates[0], transposed=transposed[0])
        b = operand(scaling, columns, depth, block, rates[1], transposed=transposed[1], scaled=scaled, seed=1)
        bias = torch.randn(columns).to(out_dtype) if epilogue[0] else None
        accumulate = torch.randn(rows, columns).to(out_dtype) if epilogue[1] else None
        compare(scaling, a, b, bias, out_dtype, accumulate, tile)

    @pytest.mark.parametrize("scaling", ["row", "block"])
    @pytest.mark.parametrize("rates", [(0.3, None), (0.4, 0.4), (None, 0.3), (1.0, 1.0)])
    @pytest.mark.parametrize("tile", TILES, ids=lambda t: f"{t.rows}x{t.columns}")
    def test_fallback_blocks_on_either_side(scaling, rates, tile):
        a = operand(scaling, 200, 390, 128, rates[0])
        b = operand(scaling, 270, 390, 128, rates[1], transposed=True, seed=1)
        compare(scaling, a, b, torch.randn(270), tile=tile)

    @pytest.mark.parametrize("scaling", ["row", "block"])
    def test_all_zero(scaling):
        zero = torch.zeros(100, 200)
        a = operand(scaling, 100, 200, 128, 0.5, x=zero)
        b = operand(scaling, 70, 200, 128, 0.5, x=zero[:70])
        assert not compare(scaling, a, b).any()

    @pytest.mark.parametrize("scaling", ["row", "block"])
    @pytest.mark.parametrize("size", [1e30, 1e-30])
    def test_huge_and_tiny(scaling, size):
        a = operand(scaling, 100, 200, 128, 0.5, x=torch.randn(100, 200) * size)
        b = operand(scaling, 70, 200, 128, 0.5, seed=1)
        compare(scaling, a, b)

    @pytest.mark.parametrize("scaling", ["row", "block"])
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    def test_what_is_not_finite_shows(scaling, value):
        x = torch.randn(300, 300)
        x[17, 200] = value
        a, b = operand(scaling, 300, 300, 128, 0.3, x=x), operand(scaling, 70, 300, 128, None, seed=1)
        out = compare(scaling, a, b)
        assert not out[17].isfinite().any()
        assert out[128:].isfinite().all()

    def test_int32_may_wrap_on_the_way_but_not_at_the_end():
        # 512 products of 32512² and then 512 of their negatives: each level passes 2^31 many times over.
        rows, depth, block = 130, 1024, 128
        blocks = blocks_along(rows, block) * (depth // block)
        sign = torch.cat([torch.ones(depth // 2), -torch.ones(depth // 2)]).to(torch.int8)
        slot = torch.arange(blocks, dtype=torch.int32).view(-1, depth // block)
        high = torch.full((blocks, block, block), 127, dtype=torch.int8)
        low = torch.zeros(rows, depth, dtype=torch.int8)
        low[:, 3] = -77
        a = QuantizedMatrix(low, high, slot, torch.ones(rows), (rows, depth), block)
        signs = sign.view(1, -1, 1, block).expand(slot.shape[0], -1, block, block).reshape(blocks, block, block)
        b = QuantizedMatrix(low, high * signs, slot, None, (rows, depth), block)
        out = compare("row", a, b)
        q_a = low.long() + 256 * 127
        q_b = low.long() + 256 * 127 * sign.long()
        exact = q_a @ q_b.t()
        assert exact.abs().max() < 2**31
        assert torch.equal(out.double(), exact.float().double())

    @pytest.mark.parametrize("scaling", ["row", "block"])
    def test_the_backend_serves_them(scaling):
        a, b = operand(scaling, 150, 260, 128, 0.3), operand(scaling, 90, 260, 128, None, seed=1)
        value = getattr(portable, f"gemm_{scaling}")(a, b, None, torch.bfloat16)
        assert_close(scaling, getattr(reference, f"gemm_{scaling}")(a, b, None, torch.bfloat16), value, TRUNCATED)

    @pytest.mark.parametrize("scaling", ["row", "block"])
    def test_nothing_to_compute(scaling):
        a, b = operand(scaling, 40, 50, 32, None), operand(scaling, 30, 50, 32, None)
        none = QuantizedMatrix(a.low[:0], None, None, a.scale[:0], (0, 50), 32)
        assert getattr(gemm, f"gemm_{scaling}")(none, b, None, torch.float32).shape == (0, 30)

    def test_errors_say_what_is_wrong():
        a, b = operand("row", 40, 50, 32, None), operand("row", 30, 80, 32, None)
        with pytest.raises(ValueError, match=r"contraction.*50.*80"):
            gemm.gemm_row(a, b, None, torch.float32)
        odd = QuantizedMatrix(a.low, None, None, a.scale, (40, 50), 48)
        with pytest.raises(ValueError, match=r"48.*32, 64, 128"):
            gemm.gemm_row(odd, odd, None, torch.float32)
        with pytest.raises(ValueError, match="scales of both"):
            gemm.gemm_block(a, QuantizedMatrix(a.low, None, None, None, (40, 50), 32), None, torch.float32)
