"""The kernel that mixes features against its reference.

Without a GPU it runs in Triton's interpreter, in a process of its own: see `interpreter`.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.kernels.interpreter import interpreting, run_interpreted

INTERPRETED = interpreting(__file__)

if not INTERPRETED and not torch.cuda.is_available():

    def test_in_the_interpreter():
        run_interpreted(__file__)

else:
    from torch._subclasses.fake_tensor import FakeTensorMode

    from lightning_int8.kernels import hadamard_features, hadamard_ops, hadamard_reference
    from tests.kernels.test_hadamard_reference import definition

    DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
    # Largest error of a rounding, in the last place; the interpreter cuts bfloat16 off.
    ROUNDED = 1.0 if INTERPRETED else 0.5

    def mixed(x: Tensor, up: Tensor | None = None) -> Tensor:
        checked: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if INTERPRETED:
            from tests.kernels.bounds import checked_accesses

            checked = checked_accesses()
        with checked:
            return hadamard_features.mix_features(x, up)

    def assert_near(x: Tensor, got: Tensor) -> None:
        """As far from the definition as one rounding, and float32 sums, take it."""
        wanted = hadamard_reference.mix_features(x, None)
        assert (got.shape, got.dtype, got.stride()) == (wanted.shape, wanted.dtype, wanted.stride())
        x = F.pad(x.cpu().double(), (0, got.shape[1] - x.shape[1])).unflatten(1, (-1, 128))
        exact = (x @ definition().t()).flatten(1)
        slack = torch.finfo(got.dtype).eps * ROUNDED * exact.abs() + torch.finfo(got.dtype).smallest_normal
        slack += 1e-6 * x.norm(dim=2).repeat_interleave(128, 1)
        assert ((got.cpu().double() - exact).abs() <= slack).all()

    # Fewer features than are mixed; ragged; whole tiles of several groups.
    CASES = [
        ((3, 5), torch.bfloat16),
        ((70, 130), torch.float16),
        ((64, 256), torch.float32),
        ((33, 129), torch.float64),
    ]
    if not INTERPRETED:
        CASES += [((1000, 2048), torch.bfloat16), ((2048, 4096 + 40), torch.float16), ((577, 1000), torch.float32)]

    @pytest.mark.parametrize(("shape", "dtype"), CASES)
    @pytest.mark.parametrize("layout", ["rows", "columns", "every other"])
    def test_equals_the_reference(shape, dtype, layout):
        x = (torch.randn(shape) * torch.randn(1, shape[1]).exp()).to(DEVICE, dtype)
        if layout == "columns":
            x = x.t().contiguous().t()
        elif layout == "every other":
            x = x.repeat_interleave(2, 1)[:, ::2]
        got = mixed(x)
        assert_near(x, got)
        assert torch.equal(got, mixed(x))

    def test_what_is_not_finite_stays_in_its_row_and_its_features():
        x = torch.randn(9, 200, device=DEVICE)
        x[2, 150], x[5, 3] = float("nan"), -float("inf")
        got = mixed(x)
        assert not got[2, 128:].isfinite().any()
        assert not got[5, :128].isfinite().any()
        got[2, 128:] = got[5, :128] = 0.0
        assert got.isfinite().all()

    @pytest.mark.parametrize("dtype", [torch.float16] if INTERPRETED else [torch.bfloat16, torch.float16])
    def test_of_an_activation(dtype):
        gate, up = (torch.randn(70, 150).to(DEVICE, dtype) * factor for factor in (4, 1))
        gate[3, 4], gate[5, 6] = 60.0, -95.0
        wanted = hadamard_reference.mix_features(gate, up)
        # The interpreter's exp is another than PyTorch's.
        torch.testing.assert_close(mixed(gate.t().contiguous().t(), up), wanted, rtol=0.01, atol=0.01)

    @pytest.mark.parametrize("shape", [(0, 3), (3, 0), (5, 140)])
    def test_tracing_sees_the_same_shapes(shape):
        x = torch.ones(shape, device=DEVICE)
        result = mixed(x)
        with FakeTensorMode() as mode:
            traced = hadamard_ops.mix_features(mode.from_tensor(x), None, "triton")
        assert (traced.shape, traced.dtype, traced.stride()) == (result.shape, result.dtype, result.stride())
