"""The wgrad of operands whose tokens are mixed, on the GPU: repeatable, and near float64 with both native GEMMs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_int8.kernels import backends, ops
from lightning_int8.kernels.hadamard_ops import quantize_hadamard
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
