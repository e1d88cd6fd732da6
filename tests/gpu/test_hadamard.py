"""Mixed operands on the GPU: repeatable, near the reference, and their products near float64 with both native GEMMs."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from lightning_int8 import int8_linear
from lightning_int8.kernels import backends, ops
from lightning_int8.kernels.hadamard_ops import quantize_hadamard, quantize_mixed
from lightning_int8.kernels.planes import QuantizedMatrix
from tests.assertions import sqnr_db
from tests.gpu.test_numerics import NATIVE, heavy_tailed, skip_unless_it_runs

pytestmark = pytest.mark.gpu


def operand(x: Tensor, up: Tensor | None, block: int, backend: str) -> QuantizedMatrix:
    low_t, scale, _ = quantize_hadamard(x, up, block, False, backend)
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
    low_t, scale, sums = quantize_hadamard(x, up, 128, True, backend)
    wanted, wanted_scale, wanted_sums = quantize_hadamard(x, up, 128, True, "reference")
    torch.testing.assert_close(scale, wanted_scale, rtol=5e-6, atol=0)
    torch.testing.assert_close(sums, wanted_sums, rtol=1e-4, atol=1e-2)
    assert (low_t.int() - wanted).abs().max() <= 1
    assert (low_t != wanted).float().mean() < 1e-3
    for _ in range(20):
        assert all(map(torch.equal, quantize_hadamard(x, up, 128, True, backend), (low_t, scale, sums)))


@pytest.mark.parametrize("shape", [(130, 576, 200), (1000, 704, 333), (2048, 2048, 1024)])
@pytest.mark.parametrize("backend", NATIVE)
def test_all_three_gemms_are_near_float64_and_repeat(backend, shape, measured):
    skip_unless_it_runs(backend)
    x, weight, dy = heavy_tailed(*shape)
    exact = {"Y": x.double() @ weight.double().t(), "dX": dy.double() @ weight.double()}
    exact["dW"] = dy.double().t() @ x.double()
    no_fallback = {"budget": None, "activation_band": (0, 0), "gradient_band": (0, 0)}

    def computed(which: str) -> dict[str, Tensor]:
        x_leaf, w_leaf = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = int8_linear(x_leaf, w_leaf, recipe={**no_fallback, "backend": which})
        y.backward(dy)
        return {"Y": y.detach(), "dX": x_leaf.grad, "dW": w_leaf.grad}

    got, wanted = computed(backend), computed("reference")
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(got.values(), computed(backend).values(), strict=True))
    for name, value in exact.items():
        db = sqnr_db(value, got[name])
        measured(f"SQNR of {name}", f"{db:.2f} dB")
        assert db == pytest.approx(sqnr_db(value, wanted[name]), abs=0.1), name
        assert db > 32, name


def assert_near(wanted: Sequence[Tensor], got: Sequence[Tensor]) -> None:
    """Sums in another order: scales in their last bits, integers at most one apart and rarely."""
    torch.testing.assert_close(got[3], wanted[3], rtol=5e-6, atol=0)
    apart = (got[0].int() - wanted[0]).abs()
    # Low bytes of 16-bit integers wrap.
    assert torch.minimum(apart, 256 - apart).max() <= 1
    assert (apart > 0).float().mean() < 1e-3


@pytest.mark.parametrize("shape", [(16384 + 7, 1416), (4096, 4096), (1000, 14336)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("capacity", [0, 300])
def test_both_operands_are_near_the_reference_and_repeat(shape, dtype, capacity):
    backend = backends.choose("auto", torch.device("cuda", 0))
    x = torch.randn(shape, device="cuda", generator=torch.Generator("cuda").manual_seed(0)).mul_(4).to(dtype)
    # Without a state, thresholds are of this tensor.
    rest = None, 0, 0.1, capacity, 128, False
    *rows, low_t, scale_t, sums = quantize_mixed(x, *rest, True, True, backend)
    wanted = quantize_mixed(x, *rest, False, False, "reference")
    assert torch.equal(rows[2], wanted[2])
    assert_near(wanted, rows)
    assert all(map(torch.equal, (low_t, scale_t), quantize_hadamard(x, None, 128, False, backend)[:2]))
    torch.testing.assert_close(sums, x.sum(0, dtype=torch.float32), rtol=1e-4, atol=1e-2)
    fallen = int((rows[2] >= 0).sum())
    for i in range(20):
        again = quantize_mixed(x, *rest, i > 0, i > 0, backend)
        for a, b in zip([*rows, low_t, scale_t, sums][: 7 if i > 0 else 4], again, strict=i > 0):
            assert torch.equal(*(t[:fallen] if t.dim() == 3 else t for t in (a, b)))
