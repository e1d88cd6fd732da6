"""The Hopper GEMMs against the reference: `row` bit for bit, `block` within float32 rounding."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lightning_int8.kernels import portable, reference
from lightning_int8.kernels.planes import QuantizedMatrix, blocks_along

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
    ),
]
# Tiles are 128×256: exact, ragged in each dimension, less than one tile, an odd number of column blocks, several
# tiles for each CTA.
SIZES = [(256, 512, 256), (300, 576, 1000), (1, 8, 16), (130, 129, 128), (640, 384, 4096), (4200, 4400, 500)]


def operand(rows: int, depth: int, rate: float | None, scale: str | None, seed: int) -> QuantizedMatrix:
    generator = torch.Generator("cuda").manual_seed(seed)
    shape = blocks_along(rows, 128), blocks_along(depth, 128)
    int8 = {"device": "cuda", "dtype": torch.int8, "generator": generator}
    low = torch.randint(-128, 128, (rows, shape[1] * 128), **int8)
    low[:, depth:] = 0
    high = slot = None
    if rate is not None:
        mask = torch.rand(shape, device="cuda", generator=generator) < rate
        slot = (mask.flatten().cumsum(0).view(shape) - 1).where(mask, -1).to(torch.int32)
        # Two entries past the last block in use, whose contents must not matter.
        high = torch.randint(-127, 128, (int(mask.sum()) + 2, 128, 128), **int8)
        if depth % 128:
            high[slot[:, -1][mask[:, -1]].long(), :, depth % 128 :] = 0
    scales = None
    if scale is not None:
        size = shape if scale == "block" else (rows,)
        scales = torch.rand(size, device="cuda", generator=generator) + 0.01
    return QuantizedMatrix(low, high, slot, scales, (rows, depth), 128)


@pytest.fixture(scope="module")
def hopper():
    return pytest.importorskip("lightning_int8.kernels.hopper")


@pytest.mark.strict
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("rates", [(None, None), (0.2, None), (None, 0.3), (0.3, 0.3), (1.0, 1.0), (0.0, 0.5)], ids=str)
def test_row_is_bit_exact(hopper, size, rates):
    rows, cols, depth = size
    a, b = operand(rows, depth, rates[0], "row", 1), operand(cols, depth, rates[1], "row", 2)
    torch.testing.assert_close(
        hopper.gemm_row(a, b, None, torch.float32), reference.gemm_row(a, b, None, torch.float32), rtol=0, atol=0
    )


@pytest.mark.strict
@pytest.mark.parametrize("scaling", ["row", "block"])
@pytest.mark.parametrize(
    ("dtype", "bias", "accumulate", "cols"),
    [
        (torch.bfloat16, torch.bfloat16, None, 512),
        (torch.float16, torch.float32, None, 512),
        (torch.bfloat16, None, torch.bfloat16, 512),
        (torch.bfloat16, torch.float32, None, 397),
        (torch.float32, None, torch.float32, 512),
        (torch.float32, torch.bfloat16, torch.float32, 397),
    ],
    ids=str,
)
def test_epilogues(hopper, dtype, scaling, bias, accumulate, cols):
    a, b = operand(384, 500, 0.2, scaling, 1), operand(cols, 500, 0.2, scaling, 2)
    for scale in (a.scale, b.scale):
        scale *= 1e-3
    bias = None if bias is None else torch.randn(cols, device="cuda").to(bias)
    accumulate = None if accumulate is None else torch.randn(384, cols, device="cuda").to(accumulate)
    name = f"gemm_{scaling}"
    out = getattr(hopper, name)(a, b, bias, dtype, accumulate)
    expected = getattr(reference, name)(a, b, bias, dtype, accumulate)
    tolerance = {"rtol": 0, "atol": 0} if scaling == "row" else {"rtol": 2**-7, "atol": 2e-2}
    torch.testing.assert_close(out, expected, **tolerance)


@pytest.mark.parametrize("scales", [(None, None), ("row", None), (None, "row")], ids=str)
def test_row_scales_may_be_folded_away(hopper, scales):
    a, b = operand(256, 384, 0.2, scales[0], 1), operand(256, 384, 0.2, scales[1], 2)
    torch.testing.assert_close(
        hopper.gemm_row(a, b, None, torch.float32), reference.gemm_row(a, b, None, torch.float32), rtol=0, atol=0
    )


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("rates", [(None, None), (0.2, None), (None, 0.3), (0.3, 0.3), (1.0, 1.0)], ids=str)
def test_block(hopper, size, rates):
    rows, cols, depth = size
    a, b = operand(rows, depth, rates[0], "block", 1), operand(cols, depth, rates[1], "block", 2)
    out = hopper.gemm_block(a, b, None, torch.float32)
    expected = reference.gemm_block(a, b, None, torch.float32)
    assert (out - expected).norm() <= 1e-6 * expected.norm()


# Rows, columns, contraction and in how many parts it is cut: one part a CTA; ragged, with parts of unequal length;
# several for each CTA.
SPLITS = [
    (512, 2048, 4096, 8),
    (300, 397, 4200, 2),
    (300, 397, 4200, 4),
    (1, 8, 4100, 8),
    (2100, 4096, 1700, 3),
]


@pytest.mark.strict
@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("rates", [(None, None), (0.2, None), (None, 0.3), (0.3, 0.3), (1.0, 1.0), (0.0, 0.5)], ids=str)
def test_a_split_contraction_is_bit_exact(hopper, monkeypatch, split, rates):
    rows, cols, depth, parts = split
    monkeypatch.setattr(hopper, "choose_parts", lambda *_: parts)
    a, b = operand(rows, depth, rates[0], "row", 1), operand(cols, depth, rates[1], "row", 2)
    torch.testing.assert_close(
        hopper.gemm_row(a, b, None, torch.float32), reference.gemm_row(a, b, None, torch.float32), rtol=0, atol=0
    )


@pytest.mark.strict
@pytest.mark.parametrize(
    ("dtype", "bias", "accumulate", "scales"),
    [
        (torch.bfloat16, torch.bfloat16, None, ("row", "row")),
        (torch.float16, torch.float32, None, ("row", None)),
        (torch.bfloat16, None, torch.bfloat16, (None, "row")),
        (torch.float32, None, torch.float32, ("row", None)),
        (torch.float32, torch.bfloat16, torch.float32, (None, None)),
    ],
    ids=str,
)
@pytest.mark.parametrize("cols", [512, 397])
def test_epilogues_of_a_split_contraction(hopper, monkeypatch, dtype, bias, accumulate, scales, cols):
    monkeypatch.setattr(hopper, "choose_parts", lambda *_: 4)
    a, b = operand(390, 2100, 0.2, scales[0], 1), operand(cols, 2100, 0.2, scales[1], 2)
    for scale in (a.scale, b.scale):
        if scale is not None:
            scale *= 1e-5
    bias = None if bias is None else torch.randn(cols, device="cuda").to(bias)
    accumulate = None if accumulate is None else torch.randn(390, cols, device="cuda").to(accumulate)
    out = hopper.gemm_row(a, b, bias, dtype, accumulate)
    torch.testing.assert_close(out, reference.gemm_row(a, b, bias, dtype, accumulate), rtol=0, atol=0)


def test_a_narrow_wgrad_is_split_and_repeatable(hopper, monkeypatch):
    chosen = []
    choose = hopper.choose_parts
    monkeypatch.setattr(hopper, "choose_parts", lambda *shape: chosen.append(choose(*shape)) or chosen[-1])
    a, b = operand(512, 16384, 0.25, "row", 1), operand(2048, 16384, 0.25, None, 2)
    expected = reference.gemm_row(a, b, None, torch.bfloat16)
    for _ in range(10):
        assert torch.equal(hopper.gemm_row(a, b, None, torch.bfloat16), expected)
    assert min(chosen) > 1


@pytest.mark.strict
@pytest.mark.parametrize("rates", [(None, None), (0.3, 0.3)], ids=str)
@pytest.mark.parametrize(
    ("rows", "cols", "depth", "group_blocks"),
    [
        (768, 2304, 32768, 8),
        (512, 2048, 16384, 32),
        (300, 397, 5000, 4),
        (300, 397, 5000, 7),
        (130, 256, 900, 2),
        (8, 8, 100, 8),
    ],
)
def test_groups_with_scales_of_their_own_are_bit_exact(hopper, rates, rows, cols, depth, group_blocks):
    a, b = operand(rows, depth, rates[0], None, 1), operand(cols, depth, rates[1], None, 2)
    groups = -(-blocks_along(depth, 128) // group_blocks)
    a = dataclasses.replace(a, scale=torch.rand(groups, rows, device="cuda") * 1e-6)
    for dtype in (torch.float32, torch.bfloat16):
        wanted = reference.gemm_row_groups(a, b, dtype, group_blocks)
        assert torch.equal(hopper.gemm_row_groups(a, b, dtype, group_blocks), wanted)
        assert torch.equal(portable.gemm_row_groups(a, b, dtype, group_blocks), wanted)


def test_more_tiles_than_processors_and_repeatable(hopper):
    a, b = operand(5000, 1024, 0.25, "row", 1), operand(6000, 1024, 0.25, "row", 2)
    expected = reference.gemm_row(a, b, None, torch.bfloat16)
    for _ in range(5):
        assert torch.equal(hopper.gemm_row(a, b, None, torch.bfloat16), expected)
