"""`int8_linear`: accuracy of every GEMM against float64, shapes, faults, checkpointing, compile and bad input."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_int8 import PRESETS, FallbackState, Int8Recipe, int8_linear, resolve_recipe, update_thresholds
from lightning_int8.kernels import backends
from lightning_int8.threshold import RATE
from tests.assertions import assert_close, sqnr_db

NONE = {"budget": None, "activation_band": (0, 0), "gradient_band": (0, 0)}
# Nothing is mixed; the wgrad takes what the other GEMMs take, with fallback.
FOLDED = {"hadamard": False}
RECIPES = [*sorted(PRESETS), FOLDED]


def heavy_tailed(tokens=512, features_in=512, features_out=256) -> tuple[Tensor, Tensor, Tensor]:
    """X with outlier channels in one block column, diffuse outliers and spikes; dY heavy-tailed by token."""
    x = torch.randn(tokens, features_in) * torch.exp(0.5 * torch.randn(tokens, features_in))
    x[:, 200:204] *= 20
    x[::512, 7] = 300
    weight = torch.randn(features_out, features_in) * 0.02
    dy = torch.randn(tokens, features_out) * torch.exp(torch.randn(tokens, 1)) * 1e-3
    return x, weight, dy


def gradients(x, weight, bias, dy, **kwargs) -> dict[str, Tensor]:
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    bias = None if bias is None else bias.clone().requires_grad_()
    y = int8_linear(x, weight, bias, **kwargs)
    y.backward(dy)
    return {"Y": y.detach(), "dX": x.grad, "dW": weight.grad, **({} if bias is None else {"db": bias.grad})}


def exact(x, weight, bias, dy) -> dict[str, Tensor]:
    x, weight, dy = x.double(), weight.double(), dy.double()
    y = F.linear(x, weight, None if bias is None else bias.double())
    flat = dy.reshape(-1, dy.shape[-1])
    out = {"Y": y, "dX": dy @ weight, "dW": flat.t() @ x.reshape(-1, x.shape[-1])}
    return out if bias is None else {**out, "db": flat.sum(0)}


# Lowest SQNR (dB) accepted for Y, dX, dW on heavy-tailed data: about 2 dB below what is measured.
FLOOR = {
    "row": (40, 38, 39),
    "block": (28, 26, 24),
    "jetfire": (28, 26, 24),
    "rowwise": (18, 32, 24),
    "llm_int8": (30, 100, 100),
}


@pytest.mark.parametrize("recipe", sorted(PRESETS))
def test_every_gradient_is_near_float64(recipe):
    x, weight, dy = heavy_tailed()
    bias = torch.randn(weight.shape[0])
    value, reference = gradients(x, weight, bias, dy, recipe=recipe), exact(x, weight, bias, dy)
    for name, floor in zip(("Y", "dX", "dW"), FLOOR[recipe], strict=True):
        assert_close(f"{recipe} {name}", reference[name], value[name], floor)
    assert_close("db", reference["db"], value["db"], 100)


def test_row_beats_block_beats_no_fallback():
    """At r = 0.2 on heavy-tailed data, for Y, dX and dW."""
    x, weight, dy = heavy_tailed(1024, 1024, 512)
    reference = exact(x, weight, None, dy)

    def measure(recipe):
        value = gradients(x, weight, None, dy, recipe=recipe)
        return {name: sqnr_db(reference[name], value[name]) for name in reference}

    row, block, none = measure("row"), measure("block"), measure({"preset": "block", **NONE})
    for name in reference:
        assert row[name] > block[name] > none[name], (name, row, block, none)


@pytest.mark.parametrize(
    ("recipe", "products"), [({}, ("Y", "dX")), (FOLDED, ("Y", "dX", "dW")), ({"preset": "block"}, ("Y", "dX", "dW"))]
)
def test_more_fallback_is_more_accurate(recipe, products):
    x, weight, dy = heavy_tailed()
    reference = exact(x, weight, None, dy)
    last = dict.fromkeys(products, -math.inf)
    for rate in (0.0, 0.2, 1.0):
        band = {"budget": None, "activation_band": (rate, rate), "gradient_band": (rate, rate)}
        value = gradients(x, weight, None, dy, recipe={**recipe, **band})
        now = {name: sqnr_db(reference[name], value[name]) for name in products}
        assert all(now[name] > last[name] for name in now), (rate, now, last)
        last = now


def test_mixing_is_more_accurate_than_fallback():
    """Without any, in each product, whose operands all have outlier columns or rows."""
    x, weight, dy = heavy_tailed()
    dy[:, 100:104] *= 20
    bands = {"budget": None, "activation_band": (0.1, 0.3), "gradient_band": (0.1, 0.3)}
    reference = exact(x, weight, None, dy)
    mixed, fallback = (gradients(x, weight, None, dy, recipe=recipe) for recipe in (NONE, {**FOLDED, **bands}))
    gain = {name: sqnr_db(reference[name], mixed[name]) - sqnr_db(reference[name], fallback[name]) for name in mixed}
    assert gain["Y"] > 6, gain
    assert gain["dX"] > 3, gain
    assert gain["dW"] > 6, gain


def test_features_padded_for_mixing_change_nothing():
    """As many blocks may fall back, which padded features have more of, and zeros of one's own count as those."""
    x, weight, dy = heavy_tailed(96, 208, 40)
    wide = F.pad(x, (0, 48)), F.pad(weight, (0, 48, 0, 88)), None, F.pad(dy, (0, 88))
    recipe = {"block_size": 16, "budget": None, "activation_band": (0.2, 0.2), "gradient_band": (0.2, 0.2)}
    value, wanted = gradients(x, weight, None, dy, recipe=recipe), gradients(*wide, recipe=recipe)
    assert torch.equal(value["Y"], wanted["Y"][:, :40])
    assert torch.equal(value["dX"], wanted["dX"][:, :208])
    assert torch.equal(value["dW"], wanted["dW"][:40, :208])


@pytest.mark.parametrize("preset", ["block", "rowwise"])
def test_only_row_scaling_mixes(preset):
    x, weight, dy = heavy_tailed(128, 192, 64)
    default, off = {"preset": preset}, {"preset": preset, "hadamard": False}
    assert not resolve_recipe(default).mixes
    assert FallbackState(resolve_recipe(default)).operands == FallbackState(resolve_recipe(off)).operands
    results = [gradients(x, weight, None, dy, recipe=recipe) for recipe in (default, off)]
    for name in results[0]:
        assert torch.equal(results[0][name], results[1][name]), name


def test_transformed_tokens_make_dw_more_accurate_and_keep_small_gradients():
    """More than fallback does; and of gradients that hardly count nothing is lost on average."""
    x, weight, dy = heavy_tailed(tokens=2000)
    loud = torch.rand(2000) < 0.5
    dy[~loud] *= 0.01
    reference = exact(x, weight, None, dy)
    small = dy[~loud].t().double() @ x[~loud].double()
    db, slope = {}, {}
    for name, recipe in {
        "hadamard": "row",
        "folded": FOLDED,
        "nearest": {**FOLDED, "stochastic_rounding": "nothing"},
    }.items():
        dw = gradients(x, weight, None, dy, recipe=recipe)["dW"]
        db[name] = sqnr_db(reference["dW"], dw)
        error = dw.double() - reference["dW"]
        slope[name] = 1 + float((error * small).sum() / small.square().sum())
    assert db["hadamard"] > db["folded"] + 4
    assert slope["hadamard"] == pytest.approx(1, abs=0.1)
    assert slope["nearest"] < 0.8


@pytest.mark.parametrize(
    "off",
    [("forward",), ("dgrad",), ("wgrad",), ("forward", "dgrad"), ("forward", "wgrad"), ("dgrad", "wgrad")],
    ids="+".join,
)
def test_each_mixed_gemm_needs_no_other(off):
    x, weight, dy = heavy_tailed()
    bias = torch.randn(weight.shape[0])
    recipe = dict.fromkeys(off, False)
    state = FallbackState(resolve_recipe(recipe))
    whole = gradients(x, weight, bias, dy, recipe="row")
    value = gradients(x, weight, bias, dy, recipe=recipe, state=state)
    reference = exact(x, weight, bias, dy)
    for gemm, name in (("forward", "Y"), ("dgrad", "dX"), ("wgrad", "dW")):
        if gemm in off:
            assert_close(name, reference[name], value[name], 100)
        else:
            assert torch.equal(value[name], whole[name]), name
    assert_close("db", reference["db"], value["db"], 100)
    update_thresholds([state])
    counted = {name: not math.isnan(rate) for name, rate in zip(state.operands, state.tensor[:, RATE], strict=True)}
    assert counted == {"x": "forward" not in off, "dy_dgrad": "dgrad" not in off}


def test_fewer_tokens_a_scale_make_dw_more_accurate():
    x, weight, dy = heavy_tailed(tokens=1100)
    # Some sequences have larger gradients, and their blocks do not fall back.
    dy *= torch.exp(torch.arange(1100) // 128 * 0.5)[:, None]
    no_fallback = {**FOLDED, **NONE}
    reference, last = exact(x, weight, None, dy), -math.inf
    results = []
    for tokens in (None, 512, 128):
        results.append(gradients(x, weight, None, dy, recipe={**no_fallback, "wgrad_group_tokens": tokens}))
        now = sqnr_db(reference["dW"], results[-1]["dW"])
        assert now > last + 0.5, (tokens, now, last)
        last = now
    assert all(torch.equal(results[0][name], result[name]) for result in results for name in ("Y", "dX"))
    everything = gradients(x, weight, None, dy, recipe={**no_fallback, "wgrad_group_tokens": 2048})
    assert torch.equal(everything["dW"], results[0]["dW"])


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    ("shape", "features_out"), [((5,), 3), ((1, 7), 1), ((2, 3, 40), 33), ((130, 576), 300), ((3, 1), 5)]
)
def test_ragged_and_nd_shapes(recipe, shape, features_out):
    x = torch.randn(shape)
    weight, bias = torch.randn(features_out, shape[-1]), torch.randn(features_out)
    dy = torch.randn(*shape[:-1], features_out)
    value, reference = (
        gradients(x, weight, bias, dy, recipe=recipe),
        exact(x.reshape(-1, shape[-1]), weight, bias, dy.reshape(-1, features_out)),
    )
    for name in reference:
        assert_close(name, reference[name].reshape(value[name].shape), value[name], 25)


@pytest.mark.parametrize("recipe", RECIPES)
def test_non_contiguous_inputs_give_the_same_result(recipe):
    x, weight, dy = heavy_tailed(256, 192, 128)
    plain = gradients(x, weight, None, dy, recipe=recipe)
    strided = gradients(
        x.t().contiguous().t(), weight.t().contiguous().t(), None, dy.t().contiguous().t(), recipe=recipe
    )
    for name in plain:
        assert_close(name, plain[name], strided[name], math.inf if name == "Y" else 120)


def test_the_dtypes_are_those_of_linear():
    x, weight, dy = heavy_tailed(64, 64, 32)
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        value = gradients(x.to(dtype), weight.to(dtype), None, dy.to(dtype))
        assert {t.dtype for t in value.values()} == {dtype}
        assert_close("Y", exact(x, weight, None, dy)["Y"], value["Y"], 25)


def test_autocast_casts_x_and_keeps_the_weight_gradient_in_float32():
    x, weight = torch.randn(64, 32, requires_grad=True), torch.randn(16, 32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = int8_linear(x, weight)
    y.float().sum().backward()
    assert (y.dtype, x.grad.dtype, weight.grad.dtype) == (torch.bfloat16, torch.float32, torch.float32)


@pytest.mark.parametrize("recipe", ["row", FOLDED, "block", "jetfire", "rowwise"])
def test_zero_rows_and_blocks_are_exactly_zero(recipe):
    x, weight, dy = heavy_tailed(256, 256, 128)
    x[:130] = 0
    dy[:130] = 0
    weight[64:] = 0
    value = gradients(x, weight, None, dy, recipe=recipe)
    assert not value["Y"][:130].any()
    assert not value["Y"][:, 64:].any()
    assert not value["dX"][:130].any()
    everything_zero = gradients(x * 0, weight, None, dy * 0, recipe=recipe)
    assert not any(t.any() for t in everything_zero.values())


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_show_where_full_precision_has_them(recipe, bad):
    x, weight, dy = heavy_tailed(300, 256, 200)
    for where in ("x", "weight", "dy"):
        broken = {"x": x.clone(), "weight": weight.clone(), "dy": dy.clone()}
        broken[where][170, 90] = bad
        value = gradients(broken["x"], broken["weight"], None, broken["dy"], recipe=recipe)
        reference = exact(broken["x"], broken["weight"], None, broken["dy"])
        for name in reference:
            hidden = ~reference[name].isfinite() & value[name].isfinite()
            assert not hidden.any(), f"{where}: {name} hides {int(hidden.sum())} non-finite values"
        if where == "x" and recipe != "llm_int8":
            assert value["Y"][:128].isfinite().all(), "rows in other blocks must stay finite"


@pytest.mark.parametrize("recipe", ["row", FOLDED, "block"])
def test_nan_and_inf_leave_thresholds_alone(recipe):
    x, weight, dy = heavy_tailed(512, 256, 256)
    healthy, hurt = FallbackState(resolve_recipe(recipe)), FallbackState(resolve_recipe(recipe))
    gradients(x, weight, None, dy, recipe=recipe, state=healthy)
    broken_x, broken_dy = x.clone(), dy.clone()
    broken_x[0, 0], broken_dy[400, 200] = float("nan"), float("inf")
    gradients(x, weight, None, dy, recipe=recipe, state=hurt)
    gradients(broken_x, weight, None, broken_dy, recipe=recipe, state=hurt)
    assert hurt.tensor.isfinite()[:, :3].all()
    assert torch.equal(hurt.tensor[:, 0], healthy.tensor[:, 0])
    update_thresholds([hurt])
    assert (hurt.tensor[:, 0] > 0).all()
    assert hurt.tensor[:, 0].isfinite().all()


@pytest.mark.parametrize("recipe", ["row", FOLDED, "block"])
def test_huge_and_tiny_magnitudes(recipe):
    x, weight, dy = heavy_tailed(256, 256, 128)
    for scale in (1e-10, 1e10):
        value = gradients(x * scale, weight, None, dy * scale, recipe=recipe)
        reference = exact(x * scale, weight, None, dy * scale)
        for name in reference:
            assert_close(f"{name} at {scale}", reference[name], value[name], 18)


@pytest.mark.parametrize("recipe", ["row", "block"])
def test_stochastic_rounding_is_unbiased_and_repeats(recipe):
    torch.manual_seed(3)
    # A weight that INT8 holds exactly, so that dY's rounding is all there is.
    weight = torch.randint(-127, 128, (64, 64)) / 127
    weight[:, 0] = 1
    x = torch.randn(4096, 64)
    # A gradient of one value far below the step of its row: rounding to nearest loses it altogether.
    dy = torch.full((4096, 64), 0.1 / 127)
    dy[:, 0] = 1.0
    both = {"preset": recipe, **NONE, **FOLDED, "stochastic_rounding": "all"}
    first, again = gradients(x, weight, None, dy, recipe=both), gradients(x, weight, None, dy, recipe=both)
    assert torch.equal(first["dX"], again["dX"])
    assert torch.equal(first["dW"], again["dW"])
    reference = exact(x, weight, None, dy)["dX"].sum(0)
    nearest = gradients(x, weight, None, dy, recipe={**both, "stochastic_rounding": "nothing"})["dX"].double().sum(0)
    stochastic = first["dX"].double().sum(0)
    assert (stochastic - reference).norm() < 0.3 * (nearest - reference).norm()


def test_small_values_rounded_stochastically_keep_small_tokens():
    torch.manual_seed(4)
    x, weight = torch.randn(4096, 64), torch.randn(64, 64)
    # Tokens whose gradients are all below half a step of their features' scales, which the first token sets.
    dy = torch.full((4096, 64), 0.1 / 127)
    dy[0] = 1.0
    x[0] = x.abs().amax()
    wanted = exact(x, weight, None, dy)["dW"] - dy[:1].t().double() @ x[:1].double()
    got = {}
    for rounding in ("nothing", "small"):
        got[rounding] = gradients(x, weight, None, dy, recipe={**FOLDED, **NONE, "stochastic_rounding": rounding})
    without_first = {name: value["dW"].double() - dy[:1].t().double() @ x[:1].double() for name, value in got.items()}
    slope = {name: float((value * wanted).sum() / wanted.square().sum()) for name, value in without_first.items()}
    assert slope["nothing"] < 0.3
    assert slope["small"] == pytest.approx(1, abs=0.1)
    assert torch.equal(got["small"]["dX"], got["nothing"]["dX"])


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("recipe", ["row", FOLDED, "block"])
def test_checkpointing_counts_once_and_changes_nothing(recipe, reentrant):
    x, weight, dy = heavy_tailed(512, 256, 256)
    state, plain_state = FallbackState(resolve_recipe(recipe)), FallbackState(resolve_recipe(recipe))
    plain = gradients(x, weight, None, dy, recipe=recipe, state=plain_state)
    xc, wc = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = checkpoint(lambda a, b: int8_linear(a, b, recipe=recipe, state=state), xc, wc, use_reentrant=reentrant)
    y.backward(dy)
    assert torch.equal(state.tensor[:, :3], plain_state.tensor[:, :3])
    assert torch.equal(xc.grad, plain["dX"])
    assert torch.equal(wc.grad, plain["dW"])


@pytest.mark.parametrize("recipe", ["row", FOLDED, "block"])
def test_a_layer_called_twice_before_its_backward(recipe):
    x, weight, dy = heavy_tailed(256, 128, 128)
    state = FallbackState(resolve_recipe(recipe))
    xc, wc = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = int8_linear(xc, wc, recipe=recipe, state=state) + int8_linear(2 * xc, wc, recipe=recipe, state=state)
    y.backward(dy)
    assert_close("dW", 3 * dy.double().t() @ x.double(), wc.grad, 15)
    assert (state.tensor[1:, 2] == 2 * 2).all()  # both backwards counted their 2 × 1 blocks


def test_a_state_is_seeded_once_and_left_alone_when_not_training():
    x, weight, _ = heavy_tailed(512, 256, 256)
    state = FallbackState(Int8Recipe())
    int8_linear(x, weight, state=state, update_state=False)
    with torch.inference_mode():
        int8_linear(x, weight, state=state)
    assert state.tensor[:, 0].isnan().all()
    assert not state.tensor[:, 1:3].any()
    int8_linear(x, weight, state=state)
    seeded = state.tensor[0, 0].clone()
    assert seeded > 0
    int8_linear(x * 100, weight, state=state)
    assert state.tensor[0, 0] == seeded
    assert state.tensor[0, 2] == 16  # two forwards of 4 × 2 blocks


@pytest.mark.parametrize(
    "flags", [(True, False, False), (False, True, False), (False, False, True), (True, True, False)]
)
@pytest.mark.parametrize("hadamard", [True, False])
def test_each_gemm_can_stay_in_high_precision(flags, hadamard):
    x, weight, dy = heavy_tailed(256, 256, 128)
    recipe = Int8Recipe(forward=flags[0], dgrad=flags[1], wgrad=flags[2], hadamard=hadamard)
    value, reference = gradients(x, weight, None, dy, recipe=recipe), exact(x, weight, None, dy)
    for name, int8 in zip(("Y", "dX", "dW"), flags, strict=True):
        sqnr = sqnr_db(reference[name], value[name])
        assert (sqnr < 60) == int8, (name, sqnr)


def test_frozen_weights_and_inputs_get_no_gradient():
    x, weight, dy = heavy_tailed(128, 64, 32)
    trained = x.clone().requires_grad_()
    int8_linear(trained, weight).backward(dy)
    assert_close("dX", dy.double() @ weight.double(), trained.grad, 25)
    adapter = weight.clone().requires_grad_()
    int8_linear(x, adapter).backward(dy)
    assert_close("dW", dy.double().t() @ x.double(), adapter.grad, 18)


@pytest.mark.parametrize("recipe", [{}, FOLDED])
def test_many_tokens_are_split_where_the_int32_bound_ends(monkeypatch, recipe):
    from lightning_int8 import functional

    x, weight, dy = heavy_tailed(300, 64, 32)
    monkeypatch.setattr(functional, "MAX_WGRAD_TOKENS", 128)
    nearest = {**recipe, "stochastic_rounding": "nothing"}
    value, reference = gradients(x, weight, None, dy, recipe=nearest), exact(x, weight, None, dy)
    for name in reference:
        assert_close(name, reference[name], value[name], 25)


def test_an_empty_batch_is_empty():
    weight = torch.randn(3, 4, requires_grad=True)
    y = int8_linear(torch.empty(0, 4), weight)
    assert y.shape == (0, 3)
    y.sum().backward()
    assert not weight.grad.any()


@pytest.mark.parametrize(
    ("x", "weight", "bias", "error", "says"),
    [
        (torch.ones(2, 4, dtype=torch.int8), torch.ones(3, 4), None, TypeError, "x is torch.int8; it must be a real"),
        (torch.ones(2, 4), torch.ones(3, 4, dtype=torch.complex64), None, TypeError, "weight is torch.complex64"),
        (
            torch.ones(2, 4),
            torch.ones(3, 4),
            torch.ones(3).double(),
            TypeError,
            "bias is torch.float64 but x and weight",
        ),
        (
            torch.ones(2, 5),
            torch.ones(3, 4),
            None,
            ValueError,
            r"x \[2, 5\] has 5 features but weight \[3, 4\] takes K=4",
        ),
        (torch.ones(2, 4), torch.ones(3, 4), torch.ones(4), ValueError, r"bias has shape \[4\].*needs \[N=3\]"),
        (torch.ones(2, 4), torch.ones(0, 4), None, ValueError, r"weight has shape \[0, 4\]"),
        (torch.ones(2, 0), torch.ones(3, 0), None, ValueError, r"weight has shape \[3, 0\]"),
        (torch.ones(2, 4), torch.ones(4), None, ValueError, r"must be \[N, K\]"),
        (torch.tensor(1.0), torch.ones(3, 4), None, ValueError, "x is a scalar"),
        (
            torch.ones(2, 4).bfloat16(),
            torch.ones(3, 4),
            None,
            TypeError,
            "x is torch.bfloat16 but weight is torch.float32",
        ),
        (torch.ones(2, 4, device="meta"), torch.ones(3, 4), None, RuntimeError, "weight is on cpu but x is on meta"),
    ],
)
def test_bad_input_is_named(x, weight, bias, error, says):
    with pytest.raises(error, match=says):
        int8_linear(x, weight, bias)


def test_a_state_of_another_recipe_is_refused():
    with pytest.raises(ValueError, match="state was made for recipe block but recipe is row"):
        int8_linear(torch.ones(2, 4), torch.ones(3, 4), state=FallbackState(PRESETS["block"]))


def test_a_backend_that_cannot_run_says_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x, weight = torch.ones(2, 4), torch.ones(3, 4)
    with pytest.raises(RuntimeError, match=r"backend='triton' cannot run on cpu.*CUDA device"):
        int8_linear(x, weight, recipe=Int8Recipe(backend="triton"))
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "cuda")
    with pytest.raises(ValueError, match="LIGHTNING_INT8_BACKEND='cuda' must be one of"):
        int8_linear(x, weight)
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "reference")
    assert int8_linear(x, weight).shape == (2, 3)


def test_flops_are_counted():
    from torch.utils.flop_counter import FlopCounterMode

    x, weight, dy = heavy_tailed(128, 256, 128)
    with FlopCounterMode(display=False) as counter:
        gradients(x, weight, None, dy)
    assert counter.get_total_flops() == 3 * 2 * 128 * 256 * 128


@pytest.mark.parametrize("recipe", ["row", "block", "rowwise", {**FOLDED, "wgrad_group_tokens": 128}])
def test_compiled_without_graph_breaks_or_recompiles(recipe):
    from torch._dynamo.testing import CompileCounterWithBackend

    recipe = resolve_recipe(recipe)

    x, weight, dy = heavy_tailed(256, 128, 96)
    eager_state, state = FallbackState(recipe), FallbackState(recipe)
    if state.operands:
        state.on(x.device)  # as converting a layer does
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda a, b: int8_linear(a, b, recipe=recipe, state=state), backend=counter, fullgraph=True
    )
    for step in range(3):
        scaled = x * (1 + step)
        eager = gradients(scaled, weight, None, dy, recipe=recipe, state=eager_state)
        xc, wc = scaled.clone().requires_grad_(), weight.clone().requires_grad_()
        y = compiled(xc, wc)
        y.backward(dy)
        for name, value in (("Y", y), ("dX", xc.grad), ("dW", wc.grad)):
            assert torch.equal(eager[name], value.detach()), (step, name)
        if eager_state.operands:
            assert torch.equal(eager_state.tensor[:, :3], state.tensor[:, :3])
            update_thresholds([eager_state])
            update_thresholds([state])
    assert counter.frame_count == 1


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("constant_dy", [False, True])
def test_differentiating_twice_raises(recipe, constant_dy):
    x = torch.randn(32, 64, requires_grad=True)
    weight = torch.randn(48, 64, requires_grad=True)
    y = int8_linear(x.tanh(), weight, recipe=recipe)
    (gradient,) = torch.autograd.grad((y if constant_dy else y.square()).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"INT8 linear cannot be differentiated twice.*ignore_modules"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("recipe", RECIPES)
def test_differentiating_twice_by_named_tensors_raises(recipe):
    x, weight = torch.randn(32, 64, requires_grad=True), torch.randn(64, 64, requires_grad=True)

    def penalty():
        y = x * int8_linear(x, weight, recipe=recipe)
        (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return gradient.square().sum()

    for what in (weight, x):
        with pytest.raises(RuntimeError, match="INT8 linear cannot be differentiated twice"):
            torch.autograd.grad(penalty(), what)
        with pytest.raises(RuntimeError, match="INT8 linear cannot be differentiated twice"):
            penalty().backward(inputs=[what])
    ones = torch.ones_like(x)
    with pytest.raises(RuntimeError, match="INT8 linear cannot be differentiated twice"):
        torch.autograd.functional.hvp(lambda z: int8_linear(z, weight, recipe=recipe).square().sum(), x, ones)
    with pytest.raises(RuntimeError, match="INT8 linear cannot be differentiated twice"):
        torch.autograd.functional.jvp(lambda z: int8_linear(z, weight, recipe=recipe), x, ones)


def test_a_graph_of_the_backward_changes_no_gradient():
    x, weight = torch.randn(32, 64, requires_grad=True), torch.randn(48, 64, requires_grad=True)
    for checkpointed in (False, True):
        grads = []
        for create_graph in (False, True):
            y = checkpoint(int8_linear, x, weight, use_reentrant=False) if checkpointed else int8_linear(x, weight)
            grads.append(torch.autograd.grad(y.square().sum(), (x, weight), create_graph=create_graph))
        for once, graph in zip(*grads, strict=True):
            assert torch.equal(once, graph.detach())


def test_a_compiled_layer_raises_as_well():
    weight = torch.randn(48, 64, requires_grad=True)
    compiled = torch.compile(lambda x: int8_linear(x, weight), backend="aot_eager", fullgraph=True)
    x = torch.randn(32, 64, requires_grad=True)
    (gradient,) = torch.autograd.grad(compiled(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.square().sum().backward()
