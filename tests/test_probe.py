"""The probe: its SQNR, outlier kinds and divergence on models and matrices whose answers are known; the command."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.llama import Llama, LlamaConfig
from lightning_int8 import convert_to_int8
from lightning_int8.float8 import float8_linear, round_to_float8
from lightning_int8.probe import GEMMS, Method, ProbeResult, methods, outliers, probe
from lightning_int8.recipe import PRESETS

SMALL = LlamaConfig(vocab_size=384, dim=64, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=160, max_seq_len=64)


def loss_of(model: Llama, seed: int = 0) -> Tensor:
    ids = torch.randint(SMALL.vocab_size, (4, 65), generator=torch.Generator().manual_seed(seed))
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def test_sqnr_against_noise_of_a_known_size():
    """Y with 1 % of noise is 40 dB; dX and dW of an exact linear have none but float32's."""
    torch.manual_seed(0)
    model = Llama(SMALL)

    def noisy(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = F.linear(x, weight, bias)
        noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
        return y + 0.01 * y.detach().square().mean().sqrt() * noise

    result = probe(model, lambda: loss_of(model), {"exact": F.linear, "noisy": noisy}, ["lm_head"])
    assert [row.name for row in result.linears] == [
        f"layers.{i}.{part}"
        for i in range(2)
        for part in (*(f"attention.{p}_proj" for p in "qkvo"), *(f"mlp.{p}_proj" for p in ("gate", "up", "down")))
    ]
    assert result.linears[0].shape == (4 * 64, 64, 64)
    assert result.column("exact", "y").min() > 120
    torch.testing.assert_close(result.column("noisy", "y"), torch.full((14,), 40.0).double(), rtol=0, atol=0.5)
    assert result.column("noisy", "dw").min() > 120
    assert result.kl["exact"] == pytest.approx(0.0, abs=1e-9)
    assert result.top1["exact"] == 1.0
    assert result.kl["noisy"] > 0
    assert all(p.grad is None for p in model.parameters())


def test_int8_by_rows_beats_fp8_and_blocks_on_bell_shaped_values():
    torch.manual_seed(0)
    model = Llama(SMALL)
    result = probe(model, lambda: loss_of(model), ignore_modules=["lm_head"])
    assert set(result.kl) == set(methods())
    for gemm in GEMMS:
        # 3 bits of mantissa on both operands: 28.5 dB; 7 bits and a sign below the AbsMax: 38 and more.
        assert 27 < result.column("float8 rowwise", gemm).median() < 30, gemm
        assert result.column("row", gemm).median() > result.column("float8 rowwise", gemm).median() + 5, gemm
        assert result.column("row", gemm).median() > result.column("row, no fallback", gemm).median() - 0.5, gemm
    # E5M2 has one bit less for dY.
    assert result.column("float8 tensorwise", "dx").median() < result.column("float8 rowwise", "dx").median() - 2
    assert result.kl["row"] < result.kl["float8 rowwise"]


def probe_of_one_linear(dy: Tensor, compared: dict[str, Method], width: int = 256) -> ProbeResult:
    """The probe of one linear whose output has the gradient ``dy [M, N]``."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(width, dy.shape[1], bias=False))
    x = torch.randn(len(dy), width)
    return probe(model, lambda: (model(x) * dy).sum(), compared)


def test_small_gradients_are_lost_kept_or_kept_on_average():
    """Every other token's gradient is 1e-4 of its neighbours': below half a step of INT8, well within FP8's range."""
    torch.manual_seed(0)
    dy = torch.randn(512, 256)
    dy[::2] *= 1e-4
    folded = dataclasses.replace(PRESETS["row"], hadamard=False)
    recipes = {
        "transformed": PRESETS["row"],
        "row": folded,
        "row, nearest": dataclasses.replace(folded, stochastic_rounding="nothing"),
        "jetfire": PRESETS["jetfire"],
        "row, stochastic": dataclasses.replace(folded, stochastic_rounding="all"),
        "block, stochastic": dataclasses.replace(PRESETS["jetfire"], stochastic_rounding="all"),
    }
    result = probe_of_one_linear(dy, {"exact": F.linear, **methods(recipes)})
    (row,) = result.linears
    assert row.small_dy == pytest.approx(2**0.5 * 1e-4, rel=0.01)
    assert row.small_dw == pytest.approx(1e-4, rel=0.01)

    def small(method: str, name: str) -> tuple[float, float]:
        return float(result.column(method, name)), float(result.slopes(method, name))

    # What is left of float32's rounding of the large tokens' sums.
    assert small("exact", "dx_small") == (float("inf"), pytest.approx(1.0, abs=1e-6))
    assert small("exact", "dw_small") == (pytest.approx(54, abs=3), pytest.approx(1.0, abs=1e-3))
    assert small("jetfire", "dx_small") == (0.0, 0.0)
    assert small("jetfire", "dw_small") == (pytest.approx(0.0, abs=0.01), pytest.approx(0.0, abs=0.01))
    # A scale for each token in the dgrad, one over all tokens in the wgrad. SQNR of all of dW shows nothing.
    assert small("row, nearest", "dx_small") == (pytest.approx(42.5, abs=1), pytest.approx(1.0, abs=1e-3))
    assert small("row, nearest", "dw_small") == (pytest.approx(0.0, abs=0.01), pytest.approx(0.0, abs=0.01))
    assert result.column("row, nearest", "dw") > 38
    assert small("row", "dx_small") == small("row, nearest", "dx_small")
    for name in ("dx_small", "dw_small"):
        assert small("float8 rowwise", name) == (pytest.approx(27, abs=3), pytest.approx(1.0, abs=0.01)), name
        sqnr, slope = small("block, stochastic", name)
        assert sqnr < -15, name
        assert slope == pytest.approx(1.0, abs=0.25), name
    for method in ("row", "row, stochastic", "transformed"):
        assert small(method, "dw_small")[1] == pytest.approx(1.0, abs=0.25), method


def test_small_gradients_through_a_network():
    """Two linears each halve what they get of small gradients: a quarter arrives at the first, a half at the last."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 32, bias=False))
    x, dy = torch.randn(128, 64), torch.randn(128, 32)
    dy[::2] *= 1e-3
    torch.nn.init.orthogonal_(model[1].weight)

    class Halves(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, dy):
            return torch.where(dy.norm(dim=-1, keepdim=True) < 0.1, dy / 2, dy)

    def halving(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return Halves.apply(F.linear(x, weight, bias))

    # Turned twice, the predictions' gradient lies in memory as no [tokens, classes] does.
    result = probe(
        model,
        lambda: (model(x.view(2, 64, 64)).mT * dy.view(2, 64, 32).mT).sum(),
        {"exact": F.linear, "halving": halving},
        ["2"],
    )
    assert [row.name for row in result.linears] == ["0", "1"]
    torch.testing.assert_close(result.kept("exact"), torch.ones(2).double(), rtol=0, atol=1e-3)
    torch.testing.assert_close(result.kept("halving"), torch.tensor([0.25, 0.5]).double(), rtol=0, atol=1e-3)


def test_no_two_methods_are_the_same():
    torch.manual_seed(0)
    # Blocks enough for the default budget to fall back in one.
    dy = torch.randn(2048, 256)
    dy[::2] *= 1e-3
    (row,) = probe_of_one_linear(dy, methods()).linears
    assert len(set(row.sqnr.values())) == len(row.sqnr)


def test_frozen_weights_are_probed():
    """As under LoRA: what they would get is measured in each linear, but nothing arrives at them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 32))
    model[1].requires_grad_(False)
    x, dy = torch.randn(128, 64), torch.randn(128, 32)
    result = probe(model, lambda: (model(x) * dy).sum(), {"row": methods()["row"]})
    assert result.kept("row").isnan().tolist() == [False, True, False]
    assert result.column("row", "dw").min() > 30
    model.requires_grad_(False)
    x.requires_grad_()
    result = probe(model, lambda: (model(x) * dy).sum(), {"row": methods()["row"]})
    assert result.kept("row").isnan().all()


def test_small_gradients_are_told_from_none():
    """Tokens without a gradient (padding, masked) do not count; one token alone has no half."""
    torch.manual_seed(0)
    dy = torch.randn(64, 32)
    dy[:40] = 0.0
    dy[40:52] *= 0.01
    (row,) = probe_of_one_linear(dy, {"row": methods()["row"]}).linears
    assert row.small_dy == pytest.approx(2**0.5 * 0.01, rel=0.2)
    assert row.small_dw == pytest.approx(0.01, rel=0.2)
    (row,) = probe_of_one_linear(dy[-1:], {"row": methods()["row"]}).linears
    assert all(math.isnan(value) for value in (row.small_dy, *row.sqnr["row"][3:], *row.slope["row"]))


def test_float8_rounding():
    x = torch.tensor([[1.0, 1.03, -448.0], [0.0, 0.0, 0.0]])
    assert round_to_float8(x, torch.float8_e4m3fn, True).tolist() == [[1.0, 1.0, -448.0], [0.0, 0.0, 0.0]]
    # A power of 2 as the scale leaves numbers of few bits as they are.
    y = torch.tensor([[3.0, 5.5, 0.875]])
    assert torch.equal(round_to_float8(y, torch.float8_e4m3fn, True), y)
    assert not torch.equal(round_to_float8(y / 3, torch.float8_e4m3fn, False) * 3, y)


def test_float8_linear_under_autocast_and_with_a_bias():
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 8, 32), torch.randn(16, 32), torch.randn(16)
    with torch.autocast("cpu", torch.bfloat16):
        y = float8_linear(x, weight, bias, "rowwise")
    assert y.dtype == torch.bfloat16
    want = F.linear(x, weight, bias)
    assert (y.float() - want).norm() / want.norm() < 0.06


def test_outlier_kinds():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 512, generator=generator)
    assert outliers(x, 32).kind == "none"
    column, row, spots = x.clone(), x.clone(), x.clone()
    column[:, 40] *= 100
    row[70] *= 100
    spots[torch.randint(512, (40,), generator=generator), torch.randint(512, (40,), generator=generator)] = 300.0
    assert outliers(column, 32).kind == "channel-wise"
    assert outliers(row, 32).kind == "token-wise"
    assert outliers(spots, 32).kind == "diffuse"
    assert outliers(column, 32).ratio > 20


def test_what_cannot_be_probed():
    model = Llama(SMALL)
    with pytest.raises(ValueError, match="No nn\\.Linear"):
        probe(model, lambda: loss_of(model), ignore_modules=["layers", "lm_head"])
    with pytest.raises(ValueError, match=r"pattern 'lm_hed' matches no module\. Names like it: lm_head"):
        probe(model, lambda: loss_of(model), ignore_modules=["lm_hed"])
    with pytest.raises(ValueError, match="small_share=0"):
        probe(model, lambda: loss_of(model), small_share=0)
    with torch.no_grad():
        frozen = model.requires_grad_(False)
    with pytest.raises(RuntimeError, match="does not require grad"):
        probe(frozen, lambda: loss_of(frozen))
    converted = Llama(SMALL)
    convert_to_int8(converted)
    with pytest.raises(ValueError, match="before it is converted"):
        probe(converted, lambda: loss_of(converted))
