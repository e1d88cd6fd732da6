"""Thresholds: the update rule, what counts towards it, and what it survives."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from torch import nn

from lightning_int8 import PRESETS, FallbackState, Int8Recipe, convert_to_int8, fallback_states, update_thresholds
from lightning_int8.threshold import (
    FALLBACK_BLOCKS,
    MAX_THRESHOLD,
    MIN_THRESHOLD,
    RATE,
    THRESHOLD,
    TOTAL_BLOCKS,
)
from tests.tiny import BATCH, RECIPE, WIDTH, TinyModel, assert_same, batches, thresholds

NAN = float("nan")


def state_of(row: list[float], recipe: Int8Recipe = RECIPE) -> FallbackState:
    state = FallbackState(recipe)
    tensor = torch.tensor([[*row, 0.0]] * len(state.operands))
    state.load_state_dict({"operands": list(state.operands), "tensor": tensor, "mixed": recipe.mixes})
    return state


@pytest.mark.parametrize(
    ("fallback", "total", "expected"),
    [(50.0, 100.0, 2.0 * 1.3), (5.0, 100.0, 2.0 / 1.3), (20.0, 100.0, 2.0), (30.0, 100.0, 2.0), (10.0, 100.0, 2.0)],
)
def test_threshold_moves_by_the_factor_only_when_the_rate_left_its_band(fallback, total, expected):
    state = state_of([2.0, fallback, total, NAN])
    update_thresholds([state])
    wanted = torch.tensor([expected, 0.0, 0.0, fallback / total]).expand(2, 4)
    torch.testing.assert_close(state.tensor[:, :4], wanted)


def test_an_overshooting_threshold_moves_back_by_less():
    """Blocks between 1.00 and 1.10: steps of 1.3 would swing between all and none, halved ones find the band."""
    values = torch.linspace(1.0, 1.1, 100)
    state = state_of([0.8, 0.0, 0.0, NAN])
    rates = []
    for _ in range(20):
        for part in state.on(torch.device("cpu")):
            part[:, FALLBACK_BLOCKS] = (values > part[0, THRESHOLD]).sum()
            part[:, TOTAL_BLOCKS] = 100
        update_thresholds([state])
        rates.append(state.tensor[0, RATE].item())
    assert rates[0] == 1.0
    assert rates[1] == pytest.approx(0.6)
    assert all(0.1 <= rate <= 0.3 for rate in rates[10:]), rates


def test_each_operand_has_its_own_band():
    recipe = dataclasses.replace(RECIPE, activation_band=(0.5, 0.6), gradient_band=(0.1, 0.2), threshold_factor=2.0)
    state = state_of([1.0, 30.0, 100.0, NAN], recipe)
    update_thresholds([state])
    assert state.tensor[:, THRESHOLD].tolist() == [0.5, 2.0]


def test_nothing_counted_leaves_threshold_and_last_rate():
    state = state_of([2.0, 0.0, 0.0, 0.25])
    update_thresholds([state])
    assert state.tensor.tolist() == [[2.0, 0.0, 0.0, 0.25, 0.0]] * 2


@pytest.mark.parametrize("bad", [0.0, float("inf"), NAN, -1.0])
def test_a_threshold_that_says_nothing_is_seeded_again(bad):
    state = state_of([bad, 50.0, 100.0, NAN])
    update_thresholds([state])
    assert state.tensor[:, THRESHOLD].isnan().all()


def test_thresholds_stay_finite_and_positive():
    top, bottom = state_of([MAX_THRESHOLD, 90.0, 100.0, NAN]), state_of([MIN_THRESHOLD, 0.0, 100.0, NAN])
    update_thresholds([top, bottom])
    assert top.tensor[0, THRESHOLD].item() == pytest.approx(MAX_THRESHOLD)
    assert bottom.tensor[0, THRESHOLD].item() == pytest.approx(MIN_THRESHOLD)


def test_recipes_without_fallback_have_no_state():
    for preset in ("jetfire", "rowwise", "llm_int8"):
        model = TinyModel()
        convert_to_int8(model, preset)
        assert fallback_states(model) == {}
        update_thresholds(model)
    only_gradients = FallbackState(dataclasses.replace(RECIPE, activation_band=(0.0, 0.0)))
    assert only_gradients.operands == ("x", "dy_dgrad")


@pytest.mark.parametrize("wgrad", [True, False])
def test_the_wgrad_has_a_threshold_where_it_falls_back(wgrad):
    """Unmixed, a wgrad in full precision keeps its row, which nothing counts; mixed, none has one."""
    unmixed = FallbackState(dataclasses.replace(RECIPE, hadamard=False, wgrad=wgrad))
    assert unmixed.operands == ("x", "dy_dgrad", "dy_wgrad")
    assert FallbackState(dataclasses.replace(RECIPE, wgrad=wgrad)).operands == ("x", "dy_dgrad")


@pytest.mark.parametrize("changed", [{}, {"hadamard": False}, {"scaling": "block"}])
def test_first_step_seeds_from_its_own_statistics_inside_the_band(changed):
    recipe = dataclasses.replace(RECIPE, **changed)
    model = TinyModel()
    convert_to_int8(model, recipe)
    x, _ = batches(4)
    model(x.requires_grad_()).square().sum().backward()
    seeded = thresholds(model)
    assert all(t[:, THRESHOLD].isfinite().all() for t in seeded.values())
    update_thresholds(model)
    for name, table in thresholds(model).items():
        rates = table[:, RATE]
        assert ((rates >= 0.1) & (rates <= 0.3)).all(), (name, rates)
        torch.testing.assert_close(table[:, THRESHOLD], seeded[name][:, THRESHOLD], rtol=0, atol=0)


def test_thresholds_follow_activations_that_grow():
    model = TinyModel()
    convert_to_int8(model, RECIPE)
    x, _ = batches(16)
    # Blocks whose AbsMax spreads over orders of magnitude, as outliers do; of equal ones a factor of 1.3 moves most.
    x = x * torch.randn(16 * BATCH // 16, 1, generator=torch.Generator().manual_seed(0)).exp().repeat_interleave(16, 0)
    state = fallback_states(model)["layers.0.up_proj"]
    rates = []
    for step in range(30):
        model(x if step < 5 else 100 * x).square().mean().backward()
        update_thresholds(model)
        rates.append(state.tensor[0, RATE].item())
    assert all(0.1 <= rate <= 0.3 for rate in rates[:5])
    assert rates[5] == pytest.approx(1.0, abs=0.01)
    assert all(0.1 <= rate <= 0.3 for rate in rates[-3:])


def test_evaluation_and_inference_leave_thresholds_and_counts_alone():
    model = TinyModel()
    convert_to_int8(model, RECIPE)
    x, _ = batches(1)
    model(x).sum().backward()
    before = thresholds(model)
    model.eval()
    model(x * 100)
    with torch.no_grad():
        model(x * 100)
    model.train()
    with torch.inference_mode():
        model(x * 100)
    assert_same(before, thresholds(model))


def test_backward_in_eval_mode_leaves_thresholds_alone():
    model = TinyModel().eval()
    convert_to_int8(model, RECIPE)
    before = thresholds(model)
    x, _ = batches(1)
    model(x.requires_grad_()).sum().backward()
    assert_same(before, thresholds(model))


def test_a_first_forward_under_inference_mode_does_not_block_training():
    model = TinyModel().to("meta")
    convert_to_int8(model, RECIPE)
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x, _ = batches(1)
    with torch.inference_mode():
        model(x)
    model(x).sum().backward()
    update_thresholds(model)
    assert all(not t.is_inference() and t[0, RATE].isfinite() for t in thresholds(model).values())


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(
    ("changed", "features"),
    [({}, 128), ({"hadamard": False}, WIDTH), ({"scaling": "block"}, WIDTH)],  # mixed features are padded
)
def test_activation_checkpointing_counts_once_and_gives_the_same_gradients(changed, features, reentrant):
    recipe = dataclasses.replace(RECIPE, **changed)
    results = []
    for mode in (None, reentrant):
        torch.manual_seed(0)
        model = TinyModel(reentrant=mode)
        convert_to_int8(model, recipe)
        x, y = batches(1)
        for _ in range(2):
            model.zero_grad()
            torch.nn.functional.cross_entropy(model(x.requires_grad_()), y).backward()
        results.append((thresholds(model), {n: p.grad for n, p in model.named_parameters()}))
    (plain_table, plain_grads), (table, grads) = results
    blocks = 2 * (BATCH // 16) * (features // 16)
    assert table["layers.0.up_proj"][0].tolist()[2] == blocks
    assert_same(plain_table, table)
    assert_same(plain_grads, grads)


def test_state_round_trip_leaves_out_counts_and_copies():
    state = state_of([2.0, 5.0, 10.0, 0.25])
    saved = state.state_dict()
    assert saved["tensor"].tolist() == [[2.0, 0.0, 0.0, 0.25, 0.0]] * 2
    other = FallbackState(RECIPE)
    other.load_state_dict(saved)
    other.discard_counts(gradient_factor=7.0)
    assert other.tensor[1, THRESHOLD] == 14.0
    assert saved["tensor"][1, THRESHOLD] == 2.0
    with pytest.raises(ValueError, match=r"recipe block has \['x', 'dy'\]"):
        FallbackState(PRESETS["block"]).load_state_dict(saved)


def test_thresholds_of_operands_that_were_not_mixed_are_refused():
    """As in checkpoints from when only the wgrad's operands were mixed, which have the same operands."""
    saved = state_of([2.0, 5.0, 10.0, 0.25]).state_dict()
    assert saved["mixed"] is True
    del saved["mixed"]
    state = FallbackState(RECIPE)
    with pytest.raises(ValueError, match=r"hadamard=False\).* hadamard=True\).* drop the saved thresholds to seed"):
        state.load_state_dict(saved)
    assert state.tensor is None


def test_thresholds_of_an_unmixed_recipe_load_without_the_key():
    """What was saved before there was mixing."""
    state = state_of([2.0, 5.0, 10.0, 0.25], dataclasses.replace(RECIPE, hadamard=False))
    saved = state.state_dict()
    assert saved.pop("mixed") is False
    other = FallbackState(state.recipe)
    other.load_state_dict(saved)
    assert torch.equal(other.tensor, saved["tensor"])


def test_discarded_counts_leave_thresholds_but_rescale_the_gradients():
    state = state_of([2.0, 5.0, 10.0, 0.25])
    state.discard_counts(gradient_factor=0.5)
    assert state.tensor[:, :4].tolist() == [[2.0, 0.0, 0.0, 0.25], [1.0, 0.0, 0.0, 0.25]]


def test_deep_copies_do_not_share_state():
    model = TinyModel()
    convert_to_int8(model, RECIPE)
    clone = copy.deepcopy(model)
    model(batches(1)[0]).sum().backward()
    assert all(math.isnan(t[0, THRESHOLD]) for t in thresholds(clone).values())


@pytest.mark.strict
def test_a_forward_on_the_meta_device_leaves_no_thresholds_there():
    with torch.device("meta"):
        fresh = torch.nn.Linear(WIDTH, WIDTH)
    convert_to_int8(fresh, RECIPE)
    assert fresh(torch.empty(4, WIDTH, device="meta")).shape == (4, WIDTH)
    assert fallback_states(fresh)[""].state_dict() == {}
    fresh.to_empty(device="cpu")
    torch.nn.init.normal_(fresh.weight)
    torch.nn.init.zeros_(fresh.bias)
    fresh(torch.randn(4, WIDTH))
    known = thresholds(fresh)
    assert known[""][0, THRESHOLD] > 0
    # The same layer asked for shapes alone keeps what it knows.
    meta = {name: parameter.to("meta") for name, parameter in fresh.named_parameters()}
    torch.func.functional_call(fresh, meta, (torch.empty(4, WIDTH, device="meta"),))
    assert_same(thresholds(fresh), known)


@pytest.mark.parametrize("wrong", ["abc", 5, [nn.Linear(4, 4)], {"layer": FallbackState(RECIPE)}])
def test_what_has_no_thresholds_is_refused(wrong):
    with pytest.raises(TypeError, match=f"its fallback_states.module..values.., not {type(wrong).__name__}"):
        update_thresholds(wrong)


def test_a_module_without_int8_layers_has_nothing_to_move():
    update_thresholds(nn.Linear(4, 4))
    update_thresholds(state for state in ())
    moved = state_of([1.0, 2.0, 2.0, NAN])
    update_thresholds(state for state in (moved,))
    assert moved.tensor[0, THRESHOLD] != 1.0
