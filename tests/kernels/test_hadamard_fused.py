"""X and dY quantized for two products at once, against the kernels that quantize them for each: every bit.

Without a GPU they run in Triton's interpreter, in a process of its own: see `interpreter`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from lightning_int8.kernels import hadamard_ops
from lightning_int8.kernels.ops import _may_count
from tests.kernels.interpreter import interpreting, run_interpreted

INTERPRETED = interpreting(__file__)


@pytest.mark.parametrize("capacity", [0, 2])
def test_tracing_sees_the_same(capacity):
    x, state = torch.randn(70, 150), torch.zeros(3, 5)
    rest = 0.2, capacity, 128, True
    ops = torch.ops.lightning_int8
    torch.library.opcheck(ops.quantize_row_hadamard, (x, state, 0, *rest, "reference"))
    torch.library.opcheck(ops.swiglu_row_hadamard, (x, x, state, 0, *rest, "reference"))
    gradient = x, torch.rand(150), state, *rest
    for bias in (True, False):
        torch.library.opcheck(ops.quantize_row_gradient_hadamard, (*gradient, bias, "reference", []))


def test_counts_once_under_checkpointing():
    def blocks(x: Tensor) -> Tensor:
        hadamard_ops.quantize_row_hadamard(x.detach(), state, 0, 0.2, 2, 128, True, "reference")
        hadamard_ops.swiglu_row_hadamard(x.detach(), x.detach(), state, 1, 0.2, 2, 128, True, "reference")
        counted.append(_may_count())
        return x * x

    state, counted = torch.full((3, 5), float("nan")), []
    state[:, 1:3] = 0
    x = torch.randn(200, 150, requires_grad=True)
    torch.utils.checkpoint.checkpoint(blocks, x, use_reentrant=False).sum().backward()
    assert counted == [True, False]
    assert state[:, 2].tolist() == [4.0, 4.0, 0.0]


if not INTERPRETED and not torch.cuda.is_available():

    def test_in_the_interpreter():
        run_interpreted(__file__)

else:
    from lightning_int8.kernels import hadamard, hadamard_fused, hadamard_reference, swiglu
    from lightning_int8.kernels.quantize import quantize_row
    from lightning_int8.kernels.quantize_gradient import quantize_row_gradient
    from tests.assertions import assert_close

    DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
    FAULTY = "columns of zeros, NaN and infinities"
    # Fewer tokens than are mixed, without fallback; ragged, a threshold to find; fewer slots than blocks over the
    # threshold; separate kernels.
    CASES = [
        ((5, 3), torch.float16, 128, "plain", None, 0),
        ((130, 140), torch.bfloat16, 128, FAULTY, float("nan"), 3),
        ((129, 129), torch.float32, 128, "transposed", 0.5, 1),
        ((40, 33), torch.float64, 32, "plain", 0.5, 1),
    ]
    if not INTERPRETED:
        CASES += [
            (shape, dtype, block, kind, threshold, capacity)
            for shape in ((384, 256), (300, 577), (4096 + 40, 2048))
            for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)
            for block, kind in ((128, "plain"), (128, FAULTY), (128, "transposed"), (64, "plain"))
            for threshold, capacity in ((None, 0), (float("nan"), 30), (0.5, 2))
        ]

    def checked() -> contextlib.AbstractContextManager[None]:
        if not INTERPRETED:
            return contextlib.nullcontext()
        from tests.kernels.bounds import checked_accesses

        return checked_accesses()

    def tensor(shape: tuple[int, int], dtype: torch.dtype, kind: str) -> Tensor:
        torch.manual_seed(shape[0])
        x = torch.randn(shape) * torch.randn(shape[0], 1).exp()
        x[shape[0] // 2] = 0.0
        if kind == FAULTY:
            x[:, 0] = 0.0
            x[shape[0] // 3, 1], x[0, 2], x[-1, 2] = float("nan"), float("inf"), -float("inf")
        x = x.to(DEVICE, dtype)
        return x.t().contiguous().t() if kind == "transposed" else x

    def states(threshold: float | None) -> list[Tensor | None]:
        if threshold is None:
            return [None, None]
        return [torch.tensor([[threshold, 3.0, 9.0, 0.25, 0.0]]).repeat(3, 1).to(DEVICE) for _ in range(2)]

    def assert_same(wanted: Sequence[Tensor], got: Sequence[Tensor], slot: Tensor) -> None:
        assert [(t.shape, t.dtype, t.stride()) for t in got] == [(t.shape, t.dtype, t.stride()) for t in wanted]
        fallen = int((slot >= 0).sum())
        for a, b in zip(wanted, got, strict=True):
            # Nothing is written past the fallback blocks.
            a, b = (t[:fallen] if t.dim() == 3 else t for t in (a, b))
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)

    @pytest.mark.parametrize(("shape", "dtype", "block", "kind", "threshold", "capacity"), CASES)
    def test_equal_the_kernels_apart(shape, dtype, block, kind, threshold, capacity):
        x = tensor(shape, dtype, kind)
        before, after = states(threshold)
        rest = 0.4, capacity, block, True
        low, _, high, _, slot, scale, _ = quantize_row(x, before, 0, *rest, False)
        t = (torch.rand(shape[1]) + 0.5).to(DEVICE)
        *gradient, dbias = quantize_row_gradient(x, t, None, None, before, *rest, "nothing", True)
        transformed = hadamard.quantize_hadamard(x, None, block)
        with checked():
            got = hadamard_fused.quantize_row_hadamard(x, after, 0, *rest)
            *got_gradient, got_dbias, low_t, mixed = hadamard_fused.quantize_row_gradient_hadamard(
                x, t, after, *rest, True
            )
        assert_same((low, high, slot, scale, *transformed), got, slot)
        assert_same((*gradient[:4], *transformed), (*got_gradient, low_t, mixed), gradient[2])
        assert_close("dbias", dbias, got_dbias, 100)
        if before is not None and after is not None:
            torch.testing.assert_close(before, after, rtol=0, atol=0, equal_nan=True)
        assert got_dbias.numel() == shape[1]

    @pytest.mark.parametrize(("block", "capacity"), [(32, 3), (128, 0), (128, 3)])
    def test_statistics_that_an_activation_has_found(block, capacity):
        rows, columns = (130, 140) if block == 128 else (40, 35)
        gate, up, dh = (tensor((rows, columns), torch.float16, "plain") * f for f in (1, 0.5, 1e-2))
        before, after = states(float("nan"))
        rest = 0.4, capacity, block, True
        h, low, _, high, _, slot, scale, _ = swiglu.swiglu_row(gate, up, before, 0, *rest, False)
        with checked():
            got = hadamard_fused.swiglu_row_hadamard(gate, up, after, 0, *rest)
        assert_same((h, low, high, slot, scale, *hadamard.quantize_hadamard(h, None, block)), got, slot)
        t = (torch.rand(columns) + 0.5).to(DEVICE)
        *gradients, _ = found = swiglu.swiglu_gradient(dh, gate, up, t, t, None, None, capacity, block, True)
        for i, dy in enumerate(gradients[:2]):
            statistics = [part[i] for part in found[2:]]
            *gradient, dbias = quantize_row_gradient(dy, t, None, None, before, *rest, "nothing", True, statistics)
            with checked():
                got = hadamard_fused.quantize_row_gradient_hadamard(dy, t, after, *rest, True, statistics)
            wanted = *gradient[:4], dbias, *hadamard.quantize_hadamard(dy, None, block)
            assert_same(wanted, got, gradient[2])
        torch.testing.assert_close(before, after, rtol=0, atol=0, equal_nan=True)

    def test_no_tokens():
        x, t, rest = torch.ones(0, 3), torch.ones(3), (0.2, 0, 128, True)
        for wanted, got in (
            (
                hadamard_reference.quantize_row_hadamard(x, None, 0, *rest),
                hadamard_fused.quantize_row_hadamard(x.to(DEVICE), None, 0, *rest),
            ),
            (
                hadamard_reference.quantize_row_gradient_hadamard(x, t, None, *rest, True),
                hadamard_fused.quantize_row_gradient_hadamard(x.to(DEVICE), t.to(DEVICE), None, *rest, True),
            ),
        ):
            assert [v.shape for v in got] == [v.shape for v in wanted]
            assert torch.equal(got[-1].cpu(), wanted[-1])
