"""The kernels that mix rows and columns against their references: both in two reads, and rows alone.

Without a GPU they run in Triton's interpreter, in a process of its own: see `interpreter`.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from lightning_int8.kernels import hadamard_ops
from lightning_int8.kernels.ops import _may_count
from tests.kernels.interpreter import interpreting, run_interpreted

INTERPRETED = interpreting(__file__)


@pytest.mark.parametrize("capacity", [0, 2])
@pytest.mark.parametrize(("columns", "sums"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("block", [48, 128])
def test_tracing_sees_the_same(capacity, columns, sums, block):
    x, state = torch.randn(70, 150), torch.zeros(3, 5)
    rest = 0.2, capacity, block, True, columns, sums, "reference"
    torch.library.opcheck(torch.ops.lightning_int8.quantize_mixed, (x, state, 0, *rest))


def test_x_counts_once_under_checkpointing_and_dy_whenever_it_is_there():
    def blocks(x: Tensor) -> Tensor:
        hadamard_ops.quantize_mixed(x.detach(), state, 0, 0.2, 2, 128, True, True, True, "reference")
        hadamard_ops.quantize_mixed(x.detach(), state, 1, 0.2, 2, 128, True, False, False, "reference")
        counted.append(_may_count())
        return x * x

    state, counted = torch.full((3, 5), float("nan")), []
    state[:, 1:3] = 0
    x = torch.randn(200, 150, requires_grad=True)
    torch.utils.checkpoint.checkpoint(blocks, x, use_reentrant=False).sum().backward()
    assert counted == [True, False]
    assert state[:, 2].tolist() == [4.0, 8.0, 0.0]


if not INTERPRETED and not torch.cuda.is_available():

    def test_in_the_interpreter():
        run_interpreted(__file__)

else:
    from lightning_int8.kernels import hadamard, hadamard_mixed, hadamard_reference

    DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
    FAULTY = "rows of zeros, NaN and infinities"

    def checked() -> contextlib.AbstractContextManager[None]:
        if not INTERPRETED:
            return contextlib.nullcontext()
        from tests.kernels.bounds import checked_accesses

        return checked_accesses()

    def tensor(shape: tuple[int, int], dtype: torch.dtype, kind: str) -> Tensor:
        torch.manual_seed(shape[0])
        x = torch.randn(shape) * torch.randn(shape[0], 1).exp() * torch.randn(1, shape[1]).exp()
        if kind == FAULTY:
            x[0] = 0.0
            x[shape[0] // 3, 1], x[1, 2], x[-1, 2] = float("nan"), float("inf"), -float("inf")
        if kind == "huge":
            # In float16 the transformed features are larger than it holds.
            x = x.sign() * (6e4 if dtype is torch.float16 else 1e37)
        x = x.to(DEVICE, dtype)
        return x.t().contiguous().t() if kind == "transposed" else x

    def assert_near(wanted: Sequence[Tensor], got: Sequence[Tensor]) -> None:
        """``low``, ``high``, ``slot`` and ``scale`` by rows, as far apart as another order of the sums takes them."""
        assert [(t.shape, t.dtype, t.stride()) for t in got] == [(t.shape, t.dtype, t.stride()) for t in wanted]
        (low, high, slot, scale), (got_low, got_high, got_slot, got_scale) = wanted, got
        assert torch.equal(slot, got_slot)
        torch.testing.assert_close(got_scale, scale, rtol=5e-6, atol=0, equal_nan=True)
        apart = (whole(got_low, got_high, slot) - whole(low, high, slot)).abs()
        # Integers of 16 bits are as often near to a tie as the sums' last bits are worth: one in some hundred.
        assert apart.max() <= 1
        assert (apart > 0).sum() <= 2 + 1e-3 * apart.numel() * (1 + 20 * (slot >= 0).float().mean())

    def whole(low: Tensor, high: Tensor, slot: Tensor) -> Tensor:
        """The integers of both bytes; only the blocks that have fallen back have a high one."""
        out = low.int()
        for row, column in (slot >= 0).nonzero().tolist():
            block = high[slot[row, column]].int() * 256
            part = out[row * len(block) : (row + 1) * len(block), column * len(block) : (column + 1) * len(block)]
            part += block[: len(part)]
        return out

    # Fewer tokens than are mixed, without fallback; ragged, a threshold to find; fewer slots than blocks over the
    # threshold; mixed first and quantized afterwards.
    CASES = [
        ((5, 140), torch.float16, 128, "huge", None, 0),
        ((130, 140), torch.bfloat16, 128, FAULTY, float("nan"), 3),
        ((130, 260), torch.float16, 128, "transposed", 0.5, 2),
        ((129, 129), torch.float32, 128, "plain", 0.5, 1),
        ((40, 33), torch.float64, 32, "plain", float("nan"), 3),
    ]
    if not INTERPRETED:
        CASES += [
            (shape, dtype, block, kind, threshold, capacity)
            for shape in ((384, 256), (300, 577), (4096 + 40, 2048))
            for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)
            for block, kind in ((128, "plain"), (128, FAULTY), (128, "transposed"), (64, "plain"), (128, "huge"))
            for threshold, capacity in ((None, 0), (float("nan"), 30), (0.5, 2))
        ]

    @pytest.mark.parametrize(("shape", "dtype", "block", "kind", "threshold", "capacity"), CASES)
    def test_both_operands(shape, dtype, block, kind, threshold, capacity):
        x = tensor(shape, dtype, kind)
        states: list[Tensor | None] = [None] * 3
        if threshold is not None:
            states = [torch.tensor([[threshold, 3.0, 9.0, 0.25, 0.0]]).to(DEVICE) for _ in range(3)]
        rest = 0, 0.3, capacity, block, True
        *wanted, _, _, sums = hadamard_reference.quantize_mixed(x, states[0], *rest, True, True)
        with checked():
            *got, low_t, scale_t, got_sums = hadamard_mixed.quantize_mixed(x, states[1], *rest, True, True)
            *alone, empty, no_scale, no_sums = hadamard_mixed.quantize_mixed(x, states[2], *rest, False, False)
        assert_near(wanted, got)
        assert empty.numel() == no_scale.numel() == no_sums.numel() == 0
        fallen = int((got[2] >= 0).sum())
        for a, b in zip(got, alone, strict=True):
            a, b = (t[:fallen] if t.dim() == 3 else t for t in (a, b))
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        for a, b in zip(hadamard.quantize_hadamard(x, None, block, True)[:2], (low_t, scale_t), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        finite = sums.isfinite()
        assert torch.equal(finite, got_sums.isfinite())
        atol = 1e-5 * float(x.float().nan_to_num(0.0, 0.0, 0.0).abs().max())
        torch.testing.assert_close(got_sums[finite], sums[finite], rtol=1e-5, atol=atol)
        for a, b in itertools.pairwise(states):
            if a is not None:
                torch.testing.assert_close(b, a, rtol=5e-6, atol=0)

    # Several rows a program; rows of an odd number of groups, and longer ones than a program has columns otherwise;
    # what is mixed first.
    ROWS = [
        ((7, 100), torch.float32, 128, FAULTY),
        ((9, 384), torch.bfloat16, 32, "plain"),
        ((3, 8200), torch.float16, 128, "huge"),
        ((5, 140), torch.float64, 64, "plain"),
        ((40, 70), torch.float32, 32, "transposed"),
    ]
    if not INTERPRETED:
        ROWS += [
            (shape, dtype, 128, kind)
            for shape in ((1000, 4096), (333, 14336), (200, 577), (64, 16384), (5, 20000))
            for dtype in (torch.bfloat16, torch.float16, torch.float32)
            for kind in ("plain", FAULTY, "transposed", "huge")
        ]

    @pytest.mark.parametrize(("shape", "dtype", "block", "kind"), ROWS)
    def test_rows_without_fallback(shape, dtype, block, kind):
        weight = tensor(shape, dtype, kind)
        rest = None, 0, 0.0, 0, block, False, False, False
        wanted = hadamard_reference.quantize_mixed(weight, *rest)
        with checked():
            got = hadamard_mixed.quantize_mixed(weight, *rest)
        assert_near(wanted[:4], got[:4])
        assert all(t.numel() == 0 for t in got[4:])

    @pytest.mark.parametrize("shape", [(0, 3), (0, 300)])
    def test_nothing_to_quantize(shape):
        x = torch.ones(shape)
        wanted = hadamard_reference.quantize_mixed(x, None, 0, 0.2, 0, 128, True, True, True)
        got = hadamard_mixed.quantize_mixed(x.to(DEVICE), None, 0, 0.2, 0, 128, True, True, True)
        assert [v.shape for v in got] == [v.shape for v in wanted]
        for a, b in zip(wanted[-2:], got[-2:], strict=True):
            assert torch.equal(a, b.cpu())
