"""The Hadamard operand's ground truth against its definition in float64, and the product that it is for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_int8.kernels.hadamard_ops import padded_tokens, quantize_hadamard
from lightning_int8.kernels.hadamard_reference import mix_features
from lightning_int8.kernels.ops import gemm_row
from lightning_int8.kernels.planes import MAX_WGRAD_TOKENS, MIN_SCALE, QuantizedMatrix
from tests.assertions import sqnr_db


def definition() -> Tensor:
    """``R = H·D / sqrt(128)``, float64, written as it is defined."""
    bits = [[place >> b & 1 for b in range(7)] for place in range(128)]
    diagonal = [(-1.0) ** (b[0] * b[1] + b[2] * b[3] + b[4] * b[5]) for b in bits]
    rows = [[(-1.0) ** bin(i & j).count("1") * diagonal[j] for j in range(128)] for i in range(128)]
    return torch.tensor(rows, dtype=torch.float64) / 128**0.5


def exact(x: Tensor, block: int) -> Tensor:
    """``(R x)ᵀ`` float64 ``[Q, M']``."""
    x = F.pad(x.double(), (0, 0, 0, padded_tokens(len(x), block) - len(x)))
    return (definition() @ x.unflatten(0, (-1, 128))).flatten(0, 1).t()


def test_the_transform_is_orthogonal():
    torch.testing.assert_close(definition() @ definition().t(), torch.eye(128, dtype=torch.float64))


@pytest.mark.parametrize(
    ("shape", "block", "dtype"),
    [((1, 3), 32, torch.float32), ((300, 70), 128, torch.bfloat16), ((384, 5), 48, torch.float64)],
)
def test_integers_and_scales_are_those_of_the_definition(shape, block, dtype):
    x = (torch.randn(shape) * torch.randn(shape[0], 1).exp()).to(dtype)
    low_t, scale, _ = quantize_hadamard(x, None, block, False, "reference")
    mixed = exact(x, block)
    assert low_t.dtype == torch.int8
    assert low_t.shape == (shape[1], 384 if shape[0] > 128 else 128)
    torch.testing.assert_close(scale.double(), mixed.abs().amax(1) / 127, rtol=1e-6, atol=0)
    assert ((mixed / scale[:, None] - low_t).abs() <= 0.5 + 1e-4).all()


def test_an_activation_is_what_pytorch_makes_of_it():
    gate, up = torch.randn(140, 9).bfloat16(), torch.randn(140, 9).bfloat16()
    fused = quantize_hadamard(gate, up, 128, True, "reference")
    apart = quantize_hadamard(F.silu(gate) * up, None, 128, True, "reference")
    assert all(map(torch.equal, fused, apart))


def test_a_constant_a_walsh_function_and_one_token_are_spread():
    x = torch.zeros(256, 3)
    x[:, 0] = 5.0
    x[:, 1] = 1.0 - 2.0 * (torch.arange(256) >> 3 & 1)
    x[130, 2] = 1e30
    low_t, scale, _ = quantize_hadamard(x, None, 128, False, "reference")
    for column, peak in ((0, 5.0), (1, 1.0)):
        assert (low_t[column].abs() == 127).sum() == 128  # of 256; the others are zero
        assert (low_t[column] == 0).sum() == 128
        torch.testing.assert_close(scale[column].item() * 127, peak * 2**0.5)
    assert (low_t[2, :128] == 0).all()
    assert (low_t[2, 128:].abs() == 127).all()


def test_the_product_of_two_operands_is_that_of_what_they_were():
    tokens, block = 1000, 128
    x, dy = torch.randn(tokens, 96), torch.randn(tokens, 64) * torch.randn(tokens, 1).exp()
    operands = []
    for operand in (dy, x):
        low_t, scale, _ = quantize_hadamard(operand, None, block, False, "reference")
        operands.append(QuantizedMatrix(low_t, None, None, scale, low_t.shape, block))
    dw = gemm_row(*operands, None, torch.float32, "reference")
    assert sqnr_db(dy.double().t() @ x.double(), dw) > 33


def test_sums_of_the_most_tokens_fit_int32():
    assert 127**2 * padded_tokens(MAX_WGRAD_TOKENS, 128) < 2**31


def test_what_is_not_finite_is_in_the_scale_and_what_is_huge_is_not():
    x = torch.randn(200, 5)
    x[3, 0], x[150, 1], x[7, 2] = float("nan"), float("inf"), -float("inf")
    x[4, 2] = float("inf")
    # The row of R whose sum of magnitudes is sqrt(128)·3e38.
    x[:128, 3] = definition()[77].sign().float() * 3e38
    low_t, scale, _ = quantize_hadamard(x, None, 128, False, "reference")
    assert (low_t[:3] == 0).all()
    assert scale[0].isnan()
    assert scale[1].isinf()
    assert not scale[2].isfinite()
    assert scale[3:].isfinite().all()
    assert low_t[3, 77] == 127
    torch.testing.assert_close(scale[3].item(), 3e38 / 127 * 128**0.5)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (130, 2)])
def test_zeros_and_no_tokens_have_the_least_scale(shape):
    low_t, scale, _ = quantize_hadamard(torch.zeros(shape), None, 32, False, "reference")
    assert low_t.shape == (shape[1], padded_tokens(shape[0], 32))
    assert (low_t == 0).all()
    assert (scale == MIN_SCALE).all()


@pytest.mark.parametrize("up", [False, True])
@pytest.mark.parametrize("sums", [False, True])
def test_tracing_sees_the_same(up, sums):
    x = torch.randn(70, 9)
    arguments = x.t() if not up else x, torch.randn(70, 9) if up else None, 48, sums, "reference"
    torch.library.opcheck(torch.ops.lightning_int8.quantize_hadamard, arguments)


@pytest.mark.parametrize(
    ("shape", "dtype"), [((1, 3), torch.float32), ((70, 300), torch.bfloat16), ((5, 384), torch.float64)]
)
def test_mixed_features_are_those_of_the_definition(shape, dtype):
    x = (torch.randn(shape) * torch.randn(1, shape[1]).exp()).to(dtype)
    mixed = mix_features(x)
    assert mixed.shape == (shape[0], 384 if shape[1] > 128 else 128)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed.double(), exact(x.t(), 128), rtol=1e-6, atol=1e-5)


def test_a_feature_with_large_values_is_spread_and_the_product_stays():
    x, weight = torch.randn(40, 200), torch.randn(30, 200)
    x[:, 77] *= 1000.0
    mixed = mix_features(x)
    assert mixed[:, :128].abs().amax(1).max() < 1.2 * x[:, 77].abs().max() / 128**0.5
    product = mixed.double() @ mix_features(weight).double().t()
    assert sqnr_db(x.double() @ weight.double().t(), product) > 110
