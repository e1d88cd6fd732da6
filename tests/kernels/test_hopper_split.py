"""Splitting the contraction: how many parts, what each covers, and their sum, bit for bit in Triton's interpreter.

The interpreted tests are collected by a process of their own: see `interpreter`.
"""

from __future__ import annotations

import pytest
import torch

from tests.kernels.interpreter import interpreting, run_interpreted

INTERPRETED = interpreting(__file__)

if not INTERPRETED:
    pytest.importorskip("triton.experimental.gluon.nvidia.hopper")

    from lightning_int8.kernels import hopper
    from lightning_int8.kernels.hopper_split import choose_parts

    @pytest.mark.parametrize(
        ("rows", "cols", "tokens", "parts"),
        [
            (512, 2048, 16384, 4),  # k and v of a 1B Llama
            (512, 2048, 4096, 3),
            (512, 2048, 2048, 1),  # too short to gain
            (1536, 1536, 16384, 3),  # two rounds of shorter parts
            (2048, 2048, 16384, 1),  # the GPU is full
            (1024, 4096, 16384, 1),
            (768, 768, 16384, 7),
            (128, 256, 16384, 8),
            (128, 256, 400, 1),
        ],
    )
    def test_few_tiles_over_many_tokens_are_split(rows, cols, tokens, parts):
        tiles, depth = hopper._tiles(torch.empty(rows, cols, device="meta")), -(-tokens // 128)
        assert choose_parts(rows, cols, depth, tiles, 132, hopper.LAG + 1) == parts

    def test_a_part_has_enough_blocks_and_a_full_gpu_is_not_split():
        for tiles in (1, 5, 30, 66, 67, 132, 500):
            for depth in range(1, 140):
                parts = choose_parts(128 * tiles, 256, depth, tiles, 132, 4)
                assert parts == 1 or (tiles <= 132 and depth // parts >= 4)

    def test_in_the_interpreter():
        run_interpreted(__file__)

else:
    from lightning_int8.kernels import reference
    from lightning_int8.kernels.hopper_pipeline import part_at
    from lightning_int8.kernels.hopper_split import add_parts
    from lightning_int8.kernels.planes import QuantizedMatrix, blocks_along
    from tests.kernels.bounds import checked_accesses

    BLOCK = 8

    def operand(rows: int, depth: int, scaled: bool, seed: int) -> QuantizedMatrix:
        """Integers so large that sums wrap, a third of the blocks fallen back."""
        generator = torch.Generator().manual_seed(seed)
        shape = blocks_along(rows, BLOCK), blocks_along(depth, BLOCK)
        int8 = {"dtype": torch.int8, "generator": generator}
        slot = reference.slots(torch.rand(shape, generator=generator) < 0.3)
        low = torch.randint(-128, 128, (rows, shape[1] * BLOCK), **int8)
        high = torch.randint(-128, 128, (shape[0] * shape[1], BLOCK, BLOCK), **int8)
        scale = (torch.rand(rows, generator=generator) + 0.01) * 1e-5 if scaled else None
        return QuantizedMatrix(low, high, slot, scale, (rows, depth), BLOCK)

    def blocks(a: QuantizedMatrix, begin: int, end: int) -> QuantizedMatrix:
        """``a`` with the blocks of the contraction from ``begin`` to before ``end``."""
        low, slot = a.low[:, begin * BLOCK : end * BLOCK], a.slot[:, begin:end]
        size = a.size[0], (end - begin) * BLOCK
        return QuantizedMatrix(low.contiguous(), a.high, slot.contiguous(), a.scale, size, BLOCK)

    @pytest.mark.parametrize("parts", [2, 3, 8])
    @pytest.mark.parametrize(
        ("rows", "cols", "dtype", "bias", "accumulate", "a_scaled", "b_scaled"),
        [
            (9, 300, torch.float32, None, None, True, True),
            (4, 256, torch.float16, torch.bfloat16, None, True, False),
            (1, 1, torch.float32, None, torch.bfloat16, False, True),
            (5, 257, torch.float32, torch.float32, torch.float32, False, False),
        ],
        ids=str,
    )
    def test_the_parts_add_up_to_the_whole(parts, rows, cols, dtype, bias, accumulate, a_scaled, b_scaled):
        depth = 19
        a, b = operand(rows, depth * BLOCK, a_scaled, 1), operand(cols, depth * BLOCK, b_scaled, 2)
        out = torch.full((rows, cols), float("nan"), dtype=dtype)
        sums = torch.empty(parts, rows, cols, dtype=torch.int32)
        for part in range(parts):
            # With 5 tiles, tile 3 of the part is the walk's number 5·part + 3.
            tile, which, begin, end = part_at.fn(5 * part + 3, 5, depth, parts)
            assert (tile, which) == (3, part)
            sums[part] = reference.integer_product(blocks(a, begin, end), blocks(b, begin, end))
        bias = None if bias is None else torch.randn(cols).to(bias)
        accumulate = None if accumulate is None else torch.randn(rows, cols).to(accumulate)
        with checked_accesses():
            add_parts(sums, a.scale, b.scale, bias, accumulate, out)
        expected = reference.gemm_row(a, b, bias, dtype, accumulate)
        torch.testing.assert_close(out, expected, rtol=0, atol=0)
