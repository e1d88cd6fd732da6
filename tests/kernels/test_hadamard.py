"""The Hadamard operand's kernels against its reference.

Without a GPU they run in Triton's interpreter, in a process of its own: see `interpreter`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tests.kernels.interpreter import interpreting, run_interpreted

INTERPRETED = interpreting(__file__)

if not INTERPRETED and not torch.cuda.is_available():

    def test_in_the_interpreter():
        run_interpreted(__file__)

else:
    from torch._subclasses.fake_tensor import FakeTensorMode

    from lightning_int8.kernels import hadamard, hadamard_ops, hadamard_reference, swiglu
    from lightning_int8.kernels.planes import MIN_SCALE
    from tests.assertions import assert_close
    from tests.kernels.test_hadamard_reference import exact

    DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
    # The interpreter's exp is another than PyTorch's.
    SILU_SQNR = 60 if INTERPRETED else 100

    def quantized(x: Tensor, up: Tensor | None, block: int, sums: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        checked: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if INTERPRETED:
            from tests.kernels.bounds import checked_accesses

            checked = checked_accesses()
        with checked:
            return hadamard.quantize_hadamard(x, up, block, sums)

    def assert_near(x: Tensor, wanted: Sequence[Tensor], got: Sequence[Tensor], block: int) -> None:
        """Scales and sums up to rounding, integers up to ties; what is not finite in the same columns."""
        for a, b in zip(wanted, got, strict=True):
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
        finite = wanted[1].isfinite()
        assert torch.equal(finite, got[1].isfinite())
        assert torch.equal(wanted[1].isnan() | wanted[1].isinf(), got[1].isnan() | got[1].isinf())
        torch.testing.assert_close(got[1][finite], wanted[1][finite], rtol=5e-6, atol=0)
        assert (got[0][~finite] == 0).all()
        at = exact(x.cpu()[:, finite.cpu()], block) / got[1][finite].cpu()[:, None].double()
        assert ((at - got[0][finite].cpu()).abs() <= 0.5 + 1e-3).all()
        assert (got[0].int() - wanted[0]).abs().max() <= 1
        assert torch.equal(wanted[2].isfinite(), got[2].isfinite())
        apart, size = (got[2] - wanted[2])[finite].abs().double(), x[:, finite].double().abs().sum(0)
        assert (apart.nan_to_num(0.0) <= 1e-6 * size).all()

    # Fewer tokens than are mixed; ragged; whole tiles of several groups.
    CASES = [
        ((5, 3), torch.bfloat16, 32),
        ((130, 70), torch.float16, 64),
        ((256, 64), torch.float32, 128),
        ((129, 33), torch.float64, 32),
    ]
    if not INTERPRETED:
        CASES += [((2048, 1000), torch.bfloat16, 128), ((4096 + 40, 2048), torch.float16, 128)]
        CASES += [((1000, 577), torch.float32, 128)]

    @pytest.mark.parametrize(("shape", "dtype", "block"), CASES)
    @pytest.mark.parametrize("layout", ["rows", "columns", "every other"])
    def test_equals_the_reference(shape, dtype, block, layout):
        rows, columns = shape
        x = (torch.randn(rows, columns) * torch.randn(rows, 1).exp()).to(DEVICE, dtype)
        if layout == "columns":
            x = x.t().contiguous().t()
        elif layout == "every other":
            x = x.repeat_interleave(2, 1)[:, ::2]
        got = quantized(x, None, block)
        assert_near(x, hadamard_reference.quantize_hadamard(x, None, block, True), got, block)
        assert all(map(torch.equal, got, quantized(x, None, block)))
        *alone, nothing = quantized(x, None, block, False)
        assert all(map(torch.equal, got, alone))
        assert nothing.numel() == 0

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_values_of_all_magnitudes(dtype):
        large, small = (3e38, 1e-30) if dtype is torch.float32 else (65504.0, 6e-8)
        x = torch.randn(200, 9)
        x[:, 0] = 0.0
        x[:, 1] = large
        x[:128, 2] = torch.where(torch.arange(128) % 3 == 0, large, -large)
        x[:, 3] *= small
        x[130, 4] = large / 4
        x[7, 5], x[150, 6], x[7, 7], x[3, 7] = float("nan"), float("inf"), float("inf"), -float("inf")
        x = x.to(DEVICE, dtype)
        got = quantized(x, None, 32)
        assert_near(x, hadamard_reference.quantize_hadamard(x, None, 32, True), got, 32)
        assert got[1].isfinite().tolist() == [True] * 5 + [False] * 3 + [True]
        assert got[1][0] == MIN_SCALE

    @pytest.mark.parametrize(
        "dtype", [torch.float16] if INTERPRETED else [torch.bfloat16, torch.float16, torch.float32]
    )
    def test_of_an_activation(dtype):
        gate, up = (torch.randn(150, 70).to(DEVICE, dtype) * factor for factor in (4, 1))
        gate[3, 4], gate[5, 6] = 60.0, -95.0
        wanted = hadamard_reference.quantize_hadamard(gate, up, 64, True)
        low_t, scale, sums = quantized(gate.t().contiguous().t(), up, 64)
        assert (low_t.int() - wanted[0]).abs().max() <= 1
        assert_close("R h", wanted[0] * wanted[1][:, None], low_t * scale[:, None], 50)
        assert_close("scales", wanted[1], scale, SILU_SQNR)
        # To the bit what the activation itself gives, which a layer keeps or computes again.
        h, *_ = swiglu.swiglu_row(gate, up, None, 0, 0.0, 0, 64, False, False)
        assert all(map(torch.equal, quantized(h, None, 64), (low_t, scale, sums)))

    @pytest.mark.parametrize("shape", [(0, 3), (3, 0), (140, 5)])
    def test_tracing_sees_the_same_shapes(shape):
        x = torch.ones(shape, device=DEVICE)
        results = quantized(x, None, 64)
        assert (results[1] == MIN_SCALE).all() == (shape[0] == 0 or shape[1] == 0)
        with FakeTensorMode() as mode:
            traced = hadamard_ops.quantize_hadamard(mode.from_tensor(x), None, 64, True, "triton")
        assert [(t.shape, t.dtype, t.stride()) for t in traced] == [(t.shape, t.dtype, t.stride()) for t in results]

    def test_what_it_cannot_take_is_said():
        x = torch.ones(4, 4, device=DEVICE)
        with pytest.raises(ValueError, match="block=48 is not among"):
            hadamard.quantize_hadamard(x, None, 48, False)
        with pytest.raises(ValueError, match="one shape and one dtype"):
            hadamard.quantize_hadamard(x, x.half(), 32, False)
