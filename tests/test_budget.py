"""A budget of fallback blocks: the mean rate comes to it, and blocks go where they remove the most error."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from examples.llama import Attention, LlamaConfig
from lightning_int8 import FallbackState, Int8Recipe, convert_to_int8, fallback_states, int8_linear, update_thresholds
from lightning_int8.budget import COLUMNS, POWER, STEP_POWER, shared_weights
from lightning_int8.kernels.power import POWER_COUNT, POWER_SUM, STEP_SUM, measure_gradient_power, measure_power
from lightning_int8.threshold import FALLBACK_BLOCKS, RATE, THRESHOLD, TOTAL_BLOCKS, _weights
from tests.tiny import TinyModel, assert_same, batches, thresholds

LIMIT = (0.0, 0.4)
RECIPE = Int8Recipe(block_size=16, budget=0.1, activation_band=LIMIT, gradient_band=LIMIT)
# Three operands with thresholds.
FOLDED = dataclasses.replace(RECIPE, hadamard=False)
BLOCKS = 768
CPU = torch.device("cpu")


def simulate(draws: list[Callable[[Tensor], Tensor]], powers: list[float], steps: int, recipe: Int8Recipe) -> Tensor:
    """Rates ``[steps, operands]`` of one layer whose operands' block AbsMax are ``draws`` of standard normals."""
    generator = torch.Generator().manual_seed(0)
    state = FallbackState(recipe)
    rates = []
    for _ in range(steps):
        for row, (draw, power) in enumerate(zip(draws, powers, strict=True)):
            part = state.on(CPU)[min(row, 1)][row]
            amax = draw(torch.randn(BLOCKS, generator=generator))
            if part[THRESHOLD].isnan():
                part[THRESHOLD] = amax.quantile(0.9)
            part[FALLBACK_BLOCKS] += (amax > part[THRESHOLD]).sum()
            part[TOTAL_BLOCKS] += BLOCKS
            part[POWER_SUM] += power
            part[STEP_SUM] += part[THRESHOLD].clamp(max=amax.max()) ** 2  # each row of plain blocks ends at θ
            part[POWER_COUNT] += 1
        update_thresholds([state])
        assert state.tensor is not None
        rates.append(state.tensor[:, RATE])
    return torch.stack(rates)


def spread(deviation: float, place: float = 4.0) -> Callable[[Tensor], Tensor]:
    return lambda normal: place * torch.exp(deviation * normal)


@pytest.mark.parametrize("scaling", ["row", "block"])
def test_mean_rate_comes_to_the_budget_and_heavy_tails_get_most(scaling):
    recipe = dataclasses.replace(FOLDED, scaling=scaling)
    draws = [spread(0.05), spread(0.3), spread(1.0)][: 3 if scaling == "row" else 2]
    rates = simulate(draws, [1.0] * len(draws), 150, recipe)[100:].mean(0)
    weight = torch.tensor([2.0, 1.0, 1.0] if scaling == "row" else [2.0, 2.0])
    assert (rates * weight).sum() / weight.sum() == pytest.approx(0.1, abs=0.015)
    assert rates[0] < 0.03
    assert rates[-1] > 2 * rates[0] + 0.1


def test_no_operand_passes_its_limit():
    rates = simulate([spread(0.05), spread(0.05), spread(2.0)], [1.0] * 3, 150, FOLDED)
    assert 0.3 < rates[100:, 2].mean() < 0.43


def test_errors_count_relative_to_the_power_of_the_operand():
    """The same AbsMax values in an operand of a tenth the amplitude are ten times the outliers."""
    rates = simulate([spread(0.05), spread(0.5), spread(0.5)], [1.0, 1.0, 0.01], 150, FOLDED)[100:].mean(0)
    assert rates[2] > 2 * rates[1]


def test_thresholds_follow_a_change_of_the_unit():
    """What a loss scale multiplies the gradients with must not look like a change of the rate."""
    state = FallbackState(RECIPE)
    row = torch.zeros(2, COLUMNS)
    row[:, [THRESHOLD, POWER, STEP_POWER]] = torch.tensor([2.0, 3.0, 0.5])
    state.load_state_dict({"operands": list(state.operands), "tensor": row, "mixed": True})
    state.discard_counts(gradient_factor=4.0)
    assert state.tensor is not None
    assert state.tensor[:, THRESHOLD].tolist() == [2.0, 8.0]
    assert state.tensor[:, POWER].tolist() == [3.0, 48.0]
    assert state.tensor[:, STEP_POWER].tolist() == [0.5, 8.0]


def test_blocks_of_a_shared_input_weigh_what_all_its_readers_repeat():
    """q, k and v of 32, 16 and 16 out-features read one X of 32: q counts its blocks, which meet 64 columns."""
    model = Attention(LlamaConfig(dim=32, n_heads=4, n_kv_heads=2, n_layers=1, ffn_dim=32))
    convert_to_int8(model, FOLDED)
    states = list(fallback_states(model).values())
    own, group = torch.tensor(_weights(states)).unbind(1)
    x, dgrad, wgrad = own.view(4, 3).unbind(1)
    assert x.tolist() == [2 * 32, 2 * 16, 2 * 16, 2 * 32]
    assert dgrad.tolist() == wgrad.tolist() == [32] * 4
    total = torch.ones(4, 3)
    total[1:3, 0] = 0
    assert shared_weights(total.flatten(), own, group).view(4, 3)[:, 0].tolist() == [128, 32, 32, 64]
    assert torch.equal(shared_weights(torch.ones(12), own, group), own)
    # A layer that did not run at all, and has no group, leaves its weight to nobody.
    assert torch.equal(shared_weights(total.flatten(), own, torch.zeros(12)), own)


def test_blocks_of_a_transformed_wgrad_weigh_nothing():
    """X meets W alone, and dY the dgrad's W."""
    assert FallbackState(RECIPE, (48, 32)).mmas == {"x": 48, "dy_dgrad": 32, "dy_wgrad": 0, "dy": 32}
    assert FallbackState(FOLDED, (48, 32)).mmas == {"x": 2 * 48, "dy_dgrad": 32, "dy_wgrad": 32, "dy": 64}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_power_is_the_mean_square_of_the_scaled_operand(dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(100, 48, generator=generator)
    s, t = torch.rand(100, generator=generator), torch.rand(48, generator=generator)
    step, other_step = torch.tensor([[1.0, 3.0]]), torch.tensor([2.0])
    state = torch.zeros(3, COLUMNS)
    measure_power(x.to(dtype), step, state, 0, "reference")
    measure_gradient_power(x.to(dtype), t, s, step, other_step, state, "reference")
    wanted = torch.stack([v.square().mean() for v in (x, x * t, x * s[:, None])])
    torch.testing.assert_close(state[:, POWER_SUM], wanted)
    assert state[:, STEP_SUM].tolist() == [5.0, 5.0, 4.0]
    assert state[:, POWER_COUNT].tolist() == [1.0, 1.0, 1.0]
    for scales, row in (((t, None), 1), ((None, s), 2)):
        state.zero_()
        measure_gradient_power(x, *scales, step, step, state, "reference")
        assert state[:, POWER_COUNT].nonzero().tolist() == [[row]]


def test_scales_by_groups_of_tokens_count_all():
    """Gradients of the second group are a tenth of the first's: so are its scales, if they are its own."""
    x, dy = torch.randn(2, 64, 32, generator=torch.Generator().manual_seed(0)).unbind()
    dy[32:] /= 10
    sums = []
    for tokens in (None, 32):
        recipe = dataclasses.replace(FOLDED, wgrad_group_tokens=tokens)
        state = FallbackState(recipe)
        weight = torch.ones(32, 32, requires_grad=True)
        int8_linear(x.clone().requires_grad_(), weight, recipe=recipe, state=state).backward(dy)
        assert state.tensor is not None
        sums.append(state.tensor[:, [POWER_SUM, STEP_SUM]])
    assert torch.equal(sums[0][:, 0], sums[1][:, 0])
    assert torch.equal(sums[0][:2, 1], sums[1][:2, 1])
    assert 0.45 < sums[1][2, 1] / sums[0][2, 1] < 0.55


def test_what_is_not_finite_leaves_the_averages_and_the_next_step_counts_again():
    model = TinyModel()
    convert_to_int8(model, RECIPE)
    x, _ = batches(1)
    bad = x.clone()
    bad[3, 3] = float("inf")
    powers = []
    for batch in (x, bad, x):
        model(batch.clone().requires_grad_()).square().mean().backward()
        update_thresholds(model)
        powers.append({name: table[:, POWER] for name, table in thresholds(model).items()})
    assert_same(powers[0], powers[1])
    for name, power in powers[2].items():
        assert (power > 0).all(), name
        assert power.isfinite().all(), name


def test_sample_of_a_long_operand_is_not_all_first_tokens():
    """Spikes on the first of every 128 tokens: 1 of 128 rows read must be one, not all or none."""
    x = torch.ones(128 * 256, 8)
    x[::128] = 100.0
    state = torch.zeros(1, COLUMNS)
    measure_power(x, None, state, 0, "reference")
    assert state[0, POWER_SUM].item() == pytest.approx(x.square().mean().item(), rel=0.6)


@pytest.mark.parametrize("fields", [{}, {"hadamard": False, "wgrad_group_tokens": 32}, {"scaling": "block"}])
def test_training_under_a_budget_and_its_checkpoint(fields):
    recipe = dataclasses.replace(RECIPE, **fields)
    models = [TinyModel(), TinyModel()]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        convert_to_int8(model, recipe)

    def step(model: TinyModel, seed: int) -> None:
        x, _ = batches(2, seed)
        model(x.exp().requires_grad_()).square().mean().backward()
        update_thresholds(model)

    for seed in range(3):
        step(models[0], seed)
    for name, state in fallback_states(models[1]).items():
        state.load_state_dict(fallback_states(models[0])[name].state_dict())
    for model in models:
        step(model, 3)
    assert_same(thresholds(models[0]), thresholds(models[1]))
    moved = thresholds(models[0])["layers.0.up_proj"]
    assert moved.shape[1] == COLUMNS
    assert (moved[:, POWER] > 0).all()
    assert not moved[:, [FALLBACK_BLOCKS, TOTAL_BLOCKS, POWER_SUM, STEP_SUM, POWER_COUNT]].any()
    fixed = FallbackState(dataclasses.replace(recipe, budget=None))
    mixed = recipe.mixes
    with pytest.raises(ValueError, match=rf"16 numbers each, hadamard={mixed}.* \(5 each, hadamard={mixed}\)"):
        fixed.load_state_dict(fallback_states(models[0])["lm_head"].state_dict())


def test_a_traced_step_is_one_graph_and_counts_the_same():
    eager, traced = TinyModel(), TinyModel()
    traced.load_state_dict(eager.state_dict())
    for model in (eager, traced):
        convert_to_int8(model, RECIPE)
    compiled = torch.compile(traced, backend="aot_eager", fullgraph=True)
    x, _ = batches(1)
    for _ in range(2):
        for model, run in ((eager, eager), (traced, compiled)):
            run(x.clone().requires_grad_()).square().mean().backward()
            update_thresholds(model)
    assert_same(thresholds(eager), thresholds(traced))


def test_a_traced_step_calls_no_op_but_those_without_a_budget():
    """Inductor would write X and dY once more for another op that reads them."""
    called = []
    for recipe in (RECIPE, dataclasses.replace(RECIPE, budget=None)):
        model, names = TinyModel(), []
        convert_to_int8(model, recipe)

        def note(graph, example_inputs, names=names):
            names += [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
            return make_boxed_func(graph.forward)

        torch._dynamo.reset()
        torch.compile(model, backend=aot_autograd(fw_compiler=note), fullgraph=True)(batches(1)[0]).mean().backward()
        called.append(sorted(names))
    assert called[0] == called[1]
    assert any("auto_functionalized" in name for name in called[0])


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"budget": "0.1"}, TypeError, "must be a number"),
        ({"budget": 0.0}, ValueError, "above 0 and below 1"),
        ({"budget": 0.1, "gradient_band": (0.1, 0.3)}, ValueError, "must start at 0"),
        ({"budget": 0.5, "activation_band": LIMIT, "gradient_band": LIMIT}, ValueError, "room above the budget"),
        (
            {"budget": 0.1, "scaling": "vector", "activation_band": (0, 0), "gradient_band": (0, 0)},
            ValueError,
            "'vector' has no block fallback",
        ),
    ],
)
def test_wrong_budgets(fields, error, message):
    with pytest.raises(error, match=message):
        Int8Recipe(**fields)
