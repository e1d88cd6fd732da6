"""Recipes: presets, mappings, and errors that name the value, what is allowed and the fix."""

from __future__ import annotations

import dataclasses

import pytest

from lightning_int8 import PRESETS, Int8Recipe, resolve_recipe


def test_presets_are_what_their_papers_say():
    assert PRESETS["row"] == Int8Recipe()
    block = PRESETS["block"]
    assert (block.scaling, block.budget, block.activation_band) == ("block", None, (0.1, 0.3))
    assert (PRESETS["jetfire"].block_size, PRESETS["jetfire"].activation_band) == (32, (0.0, 0.0))
    assert PRESETS["rowwise"].scaling == "vector"
    llm = PRESETS["llm_int8"]
    assert (llm.outlier_threshold, llm.forward, llm.dgrad, llm.wgrad) == (6.0, True, False, False)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_resolves_by_name_and_describes_itself(name):
    recipe = resolve_recipe(name)
    assert recipe is PRESETS[name]
    assert recipe.describe() == name
    assert resolve_recipe(dataclasses.asdict(recipe)) == recipe


def test_a_mapping_changes_a_preset_and_accepts_yaml_lists():
    recipe = resolve_recipe({"preset": "block", "activation_band": [0.05, 0.15], "stochastic_rounding": "all"})
    assert recipe == dataclasses.replace(PRESETS["block"], activation_band=(0.05, 0.15), stochastic_rounding="all")
    assert "activation_band=(0.05, 0.15)" in recipe.describe()


def test_rows_are_mixed_unless_that_is_turned_off():
    assert resolve_recipe({"hadamard": True}) == PRESETS["row"]
    assert Int8Recipe(hadamard=True).describe() == "row"
    off = Int8Recipe(hadamard=False)
    assert off.describe() == "Int8Recipe(hadamard=False)"
    assert [recipe.mixes for recipe in (PRESETS["row"], off, PRESETS["block"], PRESETS["rowwise"])] == [True] + 3 * [
        False
    ]
    assert not resolve_recipe({"preset": "row", "scaling": "block"}).mixes


def test_a_recipe_is_frozen_and_hashable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PRESETS["row"].block_size = 64  # type: ignore[misc]
    assert len({Int8Recipe(), Int8Recipe(), PRESETS["block"]}) == 2


@pytest.mark.parametrize(
    ("fields", "error", "says"),
    [
        ({"scaling": "column"}, ValueError, r"scaling='column' must be one of 'row', 'block', 'vector'"),
        ({"backend": "cuda"}, ValueError, r"backend='cuda' must be one of 'auto'"),
        ({"block_size": 100}, ValueError, r"block_size=100 must be a multiple of 16"),
        ({"block_size": 512}, ValueError, r"from 16 to 256"),
        ({"block_size": 48}, ValueError, r"block_size=48 does not fit .* 128 or 256, or hadamard=False"),
        ({"block_size": "128"}, TypeError, r"block_size='128' must be an integer"),
        ({"activation_band": (0.3, 0.1)}, ValueError, r"activation_band=\(0.3, 0.1\) must satisfy 0 <= lowest"),
        ({"gradient_band": (0.1, 1.5)}, ValueError, r"gradient_band=\(0.1, 1.5\)"),
        ({"gradient_band": 0.2}, TypeError, r"must be a pair"),
        ({"gradient_band": ("a", "b")}, TypeError, r"must be a number"),
        ({"threshold_factor": 1.0}, ValueError, r"threshold_factor=1.0 must be above 1"),
        ({"threshold_factor": float("nan")}, ValueError, r"threshold_factor=nan"),
        ({"stochastic_rounding": True}, TypeError, r"stochastic_rounding=True must be .* True was what 'all' is now"),
        ({"stochastic_rounding": "dgrad"}, ValueError, r"stochastic_rounding='dgrad' must be one of"),
        (
            {"preset": "rowwise", "stochastic_rounding": "small"},
            ValueError,
            r"with scaling='vector', .* Set it to 'nothing'",
        ),
        ({"forward": False, "dgrad": False, "wgrad": False}, ValueError, r"none of forward, dgrad and wgrad"),
        (
            {"wgrad_group_tokens": 4096},
            ValueError,
            r"wgrad_group_tokens=4096 with hadamard=True, .* Set hadamard=False",
        ),
        (
            {"stochastic_rounding": "all"},
            ValueError,
            r"stochastic_rounding='all' with hadamard=True, .* Choose stochastic_rounding='small', or",
        ),
        ({"hadamard": 128}, TypeError, r"hadamard=128 must be true or false"),
        ({"preset": "block", "hadamard": True}, ValueError, r"hadamard=True needs scaling='row', not 'block'"),
        ({"preset": "llm_int8", "hadamard": True}, ValueError, r"hadamard=True needs scaling='row', not 'vector'"),
        (
            {"preset": "llm_int8", "forward": False, "dgrad": True},
            ValueError,
            r"outlier_threshold=6.0 needs forward=True: .* Leave it at None",
        ),
        ({"wgrad_group_tokens": 4096.0}, TypeError, r"wgrad_group_tokens=4096.0 must be an integer or None"),
        (
            {"wgrad_group_tokens": 1000},
            ValueError,
            r"wgrad_group_tokens=1000 must be a positive multiple of block_size",
        ),
        ({"wgrad_group_tokens": 0}, ValueError, r"wgrad_group_tokens=0 .*such as 4096"),
        (
            {"preset": "block", "wgrad_group_tokens": 4096},
            ValueError,
            r"needs scaling='row' and wgrad=True, not 'block'",
        ),
        ({"outlier_threshold": 6.0}, ValueError, r"needs scaling='vector'"),
        ({"scaling": "vector"}, ValueError, r"budget=0.05 needs scaling=.* set it to None"),
        ({"scaling": "vector", "budget": None}, ValueError, r"has no block fallback"),
        ({"budget": None}, ValueError, r"activation_band=\(0, 1\) without a budget .* such as \(0.1, 0.3\)"),
        ({"activation_band": (0.1, 0.3)}, ValueError, r"budget=0.05 with .* or no fallback, set budget=None"),
        ({"preset": "fp8"}, ValueError, r"Unknown recipe 'fp8'; the presets are row, block"),
        ({"bands": (0, 0)}, ValueError, r"Unknown recipe field\(s\) bands"),
        ({1: 2, "bands": (0, 0)}, ValueError, r"Unknown recipe field\(s\) 1, bands"),
    ],
)
def test_bad_fields_are_named(fields, error, says):
    with pytest.raises(error, match=says):
        resolve_recipe(fields)


def test_what_is_no_recipe_is_refused():
    with pytest.raises(ValueError, match="Unknown recipe 'fp8'"):
        resolve_recipe("fp8")
    with pytest.raises(TypeError, match="recipe=3 of type int must be a preset's name"):
        resolve_recipe(3)  # type: ignore[arg-type]
