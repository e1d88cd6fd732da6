"""The wgrad of operands whose tokens are mixed, on the GPU: repeatable, and near float64 with both native GEMMs."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from lightning_int8 import int8_linear
from lightning_int8.kernels import backends, ops, swiglu_ops
from lightning_int8.kernels.hadamard_ops import (
    quantize_hadamard,
    quantize_row_gradient_hadamard,
    quantize_row_hadamard,
    quantize_row_mixed,
    quantize_weight_mixed,
    swiglu_row_hadamard,
    swiglu_row_mixed,
)
from lightning_int8.kernels.planes import QuantizedMatrix
from tests.assertions import sqnr_db
from tests.gpu.test_numerics import NATIVE, heavy_tailed, skip_unless_it_runs

pytestmark = pytest.mark.gpu


def operand(x: Tensor, up: Tensor | None, block: int, backend: str) -> QuantizedMatrix:
    low_t, scale = quantize_hadamard(x, up, block, backend)
    return QuantizedMatrix(low_t, None, None, scale, (low_t.shape[0], low_t.shape[1]), block)


@pytest.mark.parametrize(
    ("shape", "block"), [((130, 576, 200), 32), ((2048, 2048, 1024), 128), ((16384, 2048, 512), 128)]
)
@pytest.mark.parametrize("backend", NATIVE)
def test_wgrad_is_near_float64(backend, shape, block, measured):
    skip_unless_it_runs(backend)
    x, _, dy = heavy_tailed(*shape)
    exact = dy.double().t() @ x.double()
    found = {}
    for which in (backend, "reference"):
        dw = ops.gemm_row(operand(dy, None, block, which), operand(x, None, block, which), None, torch.float32, which)
        found[which] = sqnr_db(exact, dw)
    measured("SQNR of dW", f"{found[backend]:.2f} dB")
    assert found[backend] == pytest.approx(found["reference"], abs=0.05)
    assert found[backend] > 33


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("activation", [False, True])
def test_large_operands_are_near_the_reference_and_repeat(dtype, activation):
    backend = backends.choose("auto", torch.device("cuda", 0))
    g = torch.Generator("cuda").manual_seed(0)
    x, up = (torch.randn(16384 + 7, 1416, device="cuda", generator=g).to(dtype) for _ in range(2))
    up = up if activation else None
    low_t, scale = quantize_hadamard(x, up, 128, backend)
    wanted, wanted_scale = quantize_hadamard(x, up, 128, "reference")
    torch.testing.assert_close(scale, wanted_scale, rtol=5e-6, atol=0)
    assert (low_t.int() - wanted).abs().max() <= 1
    assert (low_t != wanted).float().mean() < 1e-3
    for _ in range(20):
        assert all(map(torch.equal, quantize_hadamard(x, up, 128, backend), (low_t, scale)))


@pytest.mark.parametrize("shape", [(16384, 4096), (4096 + 7, 1416)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("capacity", [0, 500])
def test_both_operands_in_one_read_are_those_of_two(shape, dtype, capacity):
    backend = backends.choose("auto", torch.device("cuda", 0))
    g = torch.Generator("cuda").manual_seed(0)
    x, up = (torch.randn(shape, device="cuda", generator=g).mul_(4).to(dtype) for _ in range(2))
    t = torch.rand(shape[1], device="cuda", generator=g)
    states = [torch.full((3, 5), float("nan"), device="cuda") for _ in range(2)]
    for state in states:
        state[:, 1:3] = 0
    rest = 0.1, capacity, 128, True
    apart, both = [], []
    low, _, high, _, slot, scale, _ = ops.quantize_row(x, states[0], 0, *rest, False, backend)
    apart += [low, high, slot, scale, *quantize_hadamard(x, None, 128, backend)]
    both += quantize_row_hadamard(x, states[1], 0, *rest, backend)
    low, high, slot, scale, *_, dbias = ops.quantize_row_gradient(
        x, t, None, None, states[0], *rest, "nothing", True, backend, []
    )
    apart += [low, high, slot, scale, *quantize_hadamard(x, None, 128, backend)]
    *planes, got_dbias, low_t, mixed = quantize_row_gradient_hadamard(x, t, states[1], *rest, True, backend, [])
    both += [*planes, low_t, mixed]
    h, low, _, high, _, slot, scale, _ = swiglu_ops.swiglu_row(x, up, states[0], 2, *rest, False, backend)
    apart += [h, low, high, slot, scale, *quantize_hadamard(h, None, 128, backend)]
    both += swiglu_row_hadamard(x, up, states[1], 2, *rest, backend)
    # All fallback blocks' high bytes are among the first.
    fallen = int(states[0][:, 1].min())
    for wanted, got in zip([*apart, states[0]], [*both, states[1]], strict=True):
        a, b = (v[:fallen] if v.dim() == 3 else v for v in (wanted, got))
        torch.testing.assert_close(b, a, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(got_dbias, dbias, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("shape", [(130, 576, 200), (1000, 704, 333), (2048, 2048, 1024)])
@pytest.mark.parametrize("backend", NATIVE)
def test_a_forward_of_mixed_features_is_near_float64_and_repeats(backend, shape, measured):
    skip_unless_it_runs(backend)
    x, weight, _ = heavy_tailed(*shape)
    exact = x.double() @ weight.double().t()
    fields = {"budget": None, "activation_band": (0, 0), "gradient_band": (0, 0), "forward_hadamard": True}
    found = {}
    for which in (backend, "reference"):
        recipe = {**fields, "backend": which}
        y = int8_linear(x, weight, recipe=recipe)
        found[which] = sqnr_db(exact, y)
        for _ in range(3):
            assert torch.equal(int8_linear(x, weight, recipe=recipe), y)
    measured("SQNR of Y", f"{found[backend]:.2f} dB")
    assert found[backend] == pytest.approx(found["reference"], abs=0.05)
    assert found[backend] > 32


def assert_near(wanted: Sequence[Tensor], got: Sequence[Tensor], scale_at: int = 3) -> None:
    """Sums in another order: scales in their last bits, integers at most one apart and rarely."""
    torch.testing.assert_close(got[scale_at], wanted[scale_at], rtol=5e-6, atol=0)
    apart = (got[0].int() - wanted[0]).abs()
    # Low bytes of 16-bit integers wrap.
    assert torch.minimum(apart, 256 - apart).max() <= 1
    assert (apart > 0).float().mean() < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("capacity", [0, 300])
@pytest.mark.parametrize("activation", [False, True])
def test_mixed_features_are_near_the_reference_and_repeat(dtype, capacity, activation):
    backend = backends.choose("auto", torch.device("cuda", 0))
    g = torch.Generator("cuda").manual_seed(0)
    x, up = (torch.randn(16384 + 7, 1416, device="cuda", generator=g).to(dtype) for _ in range(2))

    def quantized(wgrad: bool = True) -> tuple[Tensor, ...]:
        if activation:
            return swiglu_row_mixed(x, up, *rest, wgrad, backend)
        return x, *quantize_row_mixed(x, *rest, wgrad, backend)

    # Without a state, thresholds are of this tensor.
    rest = None, 0, 0.1, capacity, 128, False
    h, *got = quantized()
    wanted = quantize_row_mixed(h, *rest, False, "reference")
    assert torch.equal(got[2], wanted[2])
    assert_near(wanted, got)
    assert all(map(torch.equal, got[4:], quantize_hadamard(h, None, 128, backend)))
    fallen = int((got[2] >= 0).sum())
    for i in range(20):
        for a, b in zip(got[: 4 if i == 0 else 6], quantized(wgrad=i > 0)[1:], strict=i > 0):
            assert torch.equal(*(t[:fallen] if t.dim() == 3 else t for t in (a, b)))


@pytest.mark.parametrize("shape", [(4096, 4096), (1000, 14336), (2048 + 5, 1416)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_mixed_weight_is_near_the_reference_and_repeats(shape, dtype):
    backend = backends.choose("auto", torch.device("cuda", 0))
    weight = torch.randn(shape, device="cuda", generator=torch.Generator("cuda").manual_seed(0)).to(dtype)
    got = quantize_weight_mixed(weight, 128, True, backend)
    assert_near(quantize_weight_mixed(weight, 128, True, "reference"), got, 1)
    _, low_t, _, _, _, scale, _ = ops.quantize_row(weight, None, 0, 0.0, 0, 128, False, True, backend)
    assert torch.equal(got[2], scale)
    assert torch.equal(got[3], low_t)
    for _ in range(20):
        assert all(map(torch.equal, quantize_weight_mixed(weight, 128, True, backend), got))
