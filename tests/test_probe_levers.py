"""The levers: their roundings, the recipes that they vary, and what some of them are for."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from benchmarks.levers import methods
from benchmarks.roundings import ROUNDINGS, RUN
from lightning_int8.probe import LinearProbe, probe
from lightning_int8.probe import methods as probe_methods
from lightning_int8.recipe import NO_FALLBACK, PRESETS


@pytest.mark.parametrize("name", ROUNDINGS)
def test_roundings_take_a_neighbour_and_keep_the_mean(name):
    """Only nearest rounding loses what is always below half a step."""
    torch.manual_seed(0)
    v = torch.randn(400, 300)
    v[:, ::3] *= 0.1
    v[:, 1] = 127.0
    q = ROUNDINGS[name](v)
    assert ((q == v.floor()) | (q == v.ceil())).all()
    small = v[:, ::3]
    slope = float((q[:, ::3] * small).sum() / small.square().sum())
    assert slope == pytest.approx(0.0 if name == "nearest" else 1.0, abs=0.05)


def test_diffused_errors_cancel_within_a_run():
    """What a run leaves out is less than a step, where independent errors of 128 elements add up to 4.6 of them."""
    torch.manual_seed(0)
    v = 3 * torch.randn(100, 2 * RUN)
    errors = {name: (ROUNDINGS[name](v) - v).unflatten(1, (2, RUN)).sum(2) for name in ("diffused", "stochastic")}
    assert errors["diffused"].abs().max() < 1.001
    assert errors["stochastic"].abs().mean() > 3


def probed(x: Tensor, dy: Tensor, names: list[str]) -> LinearProbe:
    """The probe of one linear, with its input and its output's gradient, by these levers and by the recipes."""
    recipes = {"row": dataclasses.replace(PRESETS["row"], hadamard=False, budget=0.2), "block": PRESETS["block"]}
    recipes |= {
        f"{name} to nearest": dataclasses.replace(recipe, stochastic_rounding="nothing")
        for name, recipe in recipes.items()
    }
    recipes["row, mixed"] = dataclasses.replace(
        PRESETS["row"], budget=None, activation_band=NO_FALLBACK, gradient_band=NO_FALLBACK
    )
    compared = {name: methods()[name] for name in names} | probe_methods(recipes, float8=False)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(x.shape[1], dy.shape[1], bias=False))
    return probe(model, lambda: (model(x) * dy).sum(), compared).linears[0]


def test_the_simulation_of_row_and_block_is_as_good_as_the_recipes():
    torch.manual_seed(0)
    x, dy = torch.randn(1024, 512) * torch.rand(1024, 1), torch.randn(1024, 256) * torch.rand(1024, 1) ** 4
    pairs = {"row 0.2": "row to nearest", "block, nearest": "block to nearest", "dW stochastic below 1": "row"}
    pairs |= {"features and tokens mixed": "row, mixed"}
    row = probed(x, dy, [*pairs])
    for simulated, recipe in pairs.items():
        assert row.sqnr[simulated] == pytest.approx(row.sqnr[recipe], abs=0.3), recipe


def test_tokens_in_the_order_of_their_size_share_scales_with_their_like():
    torch.manual_seed(0)
    x, dy = torch.randn(512, 128), torch.randn(512, 128)
    dy[::2] *= 1e-3
    row = probed(x, dy, ["groups of 256", "sorted, groups of 256", "Hadamard over 128"])
    assert row.sqnr["groups of 256"][4] < 1
    assert row.sqnr["sorted, groups of 256"][4] > 35
    assert row.slope["Hadamard over 128"][1] == pytest.approx(1.0, abs=0.2)


def test_centered_errors_meet_x_without_its_mean():
    torch.manual_seed(0)
    x, dy = torch.randn(512, 128) + 5, torch.randn(512, 128)
    row = probed(x, dy, ["centered", "row 0.2"])
    assert row.sqnr["centered"][2] > row.sqnr["row 0.2"][2] + 2


def test_mixed_operands_leave_the_products_as_they_are():
    """Errors as small as those of 8 bits on normal values, also where channels are large."""
    torch.manual_seed(0)
    x, dy = torch.randn(500, 300), torch.randn(500, 200)
    x[:, ::16] *= 20
    dy[:, ::16] *= 20
    names = [
        "features and tokens mixed",
        "no fallback",
        "Hadamard over 128, no fallback",
        "Hadamard over 16, no fallback",
    ]
    row = probed(x, dy, names)
    mixed, plain, tokens, few = (row.sqnr[name] for name in names)
    assert all(a > b + 3 for a, b in zip(mixed[:3], plain[:3], strict=True)), (mixed, plain)
    assert mixed[2] == pytest.approx(tokens[2], abs=0.1)
    assert few[2] > plain[2] + 3
