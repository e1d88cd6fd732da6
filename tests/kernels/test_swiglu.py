"""The fused SwiGLU kernels against PyTorch's activation and the quantize kernels, integer for integer.

Without a GPU they run in Triton's interpreter, in a process of its own: see `interpreter`.
"""

from __future__ import annotations

import pytest
import torch

from tests.kernels.interpreter import interpreting, run_interpreted

INTERPRETED = interpreting(__file__)

if not INTERPRETED and not torch.cuda.is_available():

    def test_in_the_interpreter():
        run_interpreted(__file__)

else:
    from torch._subclasses.fake_tensor import FakeTensorMode

    from lightning_int8.kernels import quantize, quantize_gradient, swiglu, swiglu_ops, swiglu_planes, swiglu_reference
    from tests.assertions import EXACT, assert_close

    DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
    # The interpreter's exp is another than PyTorch's, and it truncates to bfloat16.
    SQNR = 65 if INTERPRETED else EXACT
    DTYPES = (torch.float16,) if INTERPRETED else (torch.bfloat16, torch.float16, torch.float32)

    def tensors(rows: int, columns: int, dtype: torch.dtype) -> list[torch.Tensor]:
        torch.manual_seed(rows)
        gate, up, dh = (torch.randn(rows, columns) * factor for factor in (4, 1, 0.1))
        gate[rows // 2, 3] = 60.0
        gate[rows // 2, 4] = -95.0
        up[:, columns // 2] *= 20
        return [t.to(DEVICE, dtype) for t in (gate, up, dh)]

    def assert_planes_equal(name, wanted, got, slots, highs):
        for i, (a, b) in enumerate(zip(wanted, got, strict=True)):
            if i in highs:
                used = int((wanted[slots[highs.index(i)]] >= 0).sum())
                a, b = a[:used], b[:used]
            # The bias gradient's sum is taken in another order.
            assert_close(f"{name} {i}", a, b, 90 if i == 8 else EXACT, check_dtype=True)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("shape", "capacity"), [((70, 50, 32), 3), ((64, 70, 64), 0)])
    def test_forward(shape, dtype, capacity):
        rows, columns, block = shape
        gate, up, _ = tensors(rows, columns, dtype)
        states = [torch.tensor([[float("nan"), 1.0, 2.0, 0.0, 0.0]], device=DEVICE) for _ in range(2)]
        rest = 0, 0.3, capacity, block, True, True
        h, *planes = swiglu.swiglu_row(gate, up.t().contiguous().t(), states[0], *rest)
        assert_close("h", swiglu_reference.swiglu_row(gate, up, None, *rest)[0], h, SQNR, check_dtype=True)
        wanted = quantize.quantize_row(h, states[1], *rest)
        assert_planes_equal("planes", wanted, planes, (4, 4), (2, 3))
        assert_close("state", states[1], states[0], EXACT)
        _, low_t, _, high_t, slot, scale, _ = planes
        again = swiglu_planes.swiglu_planes(gate, up.t().contiguous().t(), scale, slot, capacity, block)
        used = int((slot >= 0).sum())
        assert (used > 0) == (capacity > 0)
        for name, a, b in zip(("low", "high"), (low_t, high_t[:used]), (again[0], again[1][:used]), strict=True):
            assert_close(f"{name} again", a, b, EXACT, check_dtype=True)
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(t) for t in (gate, up, scale, slot)]
            traced = swiglu_ops.swiglu_planes(*fakes, capacity, block, "triton")
        assert [(t.shape, t.dtype, t.stride()) for t in traced] == [(t.shape, t.dtype, t.stride()) for t in again]

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(
        ("shape", "dgrad", "wgrad", "bias", "capacity", "stochastic"),
        [
            ((70, 50, 32), True, True, True, 3, "nothing"),
            ((64, 70, 64), True, True, False, 0, "all"),
            ((33, 32, 32), True, False, False, 3, "all"),
            ((33, 32, 32), False, True, True, 3, "small"),
        ],
    )
    def test_backward(shape, dtype, dgrad, wgrad, bias, capacity, stochastic):
        rows, columns, block = shape
        gate, up, dh = tensors(rows, columns, dtype)
        scales = [torch.rand(columns, device=DEVICE) if dgrad else None for _ in range(2)]
        s = torch.rand(rows, device=DEVICE) if wgrad else None
        m = torch.randint(0, 32513, (rows,), device=DEVICE).float() if wgrad else None
        states = [torch.full((3, 5), float("nan"), device=DEVICE) for _ in range(4)]
        for state in states:
            state[:, 1:] = 1.0
        rest = 0.3, capacity, block, True, stochastic
        dgate, dup, *statistics = swiglu.swiglu_gradient(dh, gate, up, *scales, s, m, capacity, block, bias)
        exact = torch.ops.aten.silu_backward(dh * up, gate), dh * torch.nn.functional.silu(gate)
        for i, (name, dy) in enumerate((("dgate", dgate), ("dup", dup))):
            assert_close(name, exact[i], dy, SQNR, check_dtype=True)
            wanted, got = (
                quantize_gradient.quantize_row_gradient(dy, scales[i], s, m, states[2 * i + j], *rest, bias, found)
                for j, found in enumerate(((), [part[i] for part in statistics]))
            )
            assert_planes_equal(name, wanted, got, (2, 6), (1, 5))
            assert_close("state", states[2 * i], states[2 * i + 1], EXACT)

    @pytest.mark.parametrize(("dgrad", "wgrad", "bias", "capacity"), [(True, True, True, 3), (False, False, False, 0)])
    def test_tracing_sees_the_same_shapes(dgrad, wgrad, bias, capacity):
        gate, up, dh = tensors(70, 50, torch.float16)
        t = torch.rand(50, device=DEVICE) if dgrad else None
        s = torch.rand(70, device=DEVICE) if wgrad else None
        arguments = [dh, gate, up, t, t, s, s, capacity, 32, bias]
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
            traced = swiglu_ops.swiglu_gradient(*fakes, "triton")
        dgate, dup, *statistics = swiglu.swiglu_gradient(*arguments)
        for a, b in zip((dgate, *statistics), traced, strict=True):
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
        again = swiglu_ops.swiglu_gradient(*arguments, "triton")
        assert_close("dgate in place", dgate, again[0], EXACT)
        assert_close("dup in place", dup, dh, EXACT)

    def test_what_it_cannot_take_is_said():
        x = torch.ones(4, 4, device=DEVICE)
        with pytest.raises(ValueError, match=r"one shape and one dtype.*float32 \(4, 4\), torch.float16 \(4, 4\)"):
            swiglu.swiglu_row(x, x.half(), None, 0, 0.2, 0, 32, True, True)
