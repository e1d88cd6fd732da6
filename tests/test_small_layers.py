"""Which layers are left out as too small to gain, and that the report says so."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_int8 import FallbackInt8Precision, Int8Linear, convert_to_int8, small_layers
from lightning_int8.recipe import resolve_recipe


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 16), nn.Linear(16, 64), nn.Linear(256, 256))


def test_a_layer_is_as_wide_as_the_square_one_that_gains_as_much() -> None:
    assert small_layers.effective_features(4096, 4096) == 4096
    # 4·x·(1/5) of the width: quantizing costs 1 + 4 widths, the product 4 widths squared.
    assert small_layers.effective_features(1024, 4096) == pytest.approx(1638.4)


def test_layers_below_an_integer_stay_and_the_report_says_why() -> None:
    net = model()
    report = convert_to_int8(net, min_features=64)
    assert report.converted == ("0", "3")
    assert [type(layer) for layer in net] == [Int8Linear, nn.Linear, nn.Linear, Int8Linear]
    assert all("too small to gain" in reason and "min_features=64" in reason for reason in report.skipped.values())
    assert "min_features=64" in report.summary()
    # Called again, as Lightning does, with the same threshold: nothing changes.
    assert convert_to_int8(net, min_features=64).newly_converted == ()


def test_auto_converts_all_where_there_is_no_gpu(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert len(convert_to_int8(model(), min_features="auto").converted) == 4


def test_auto_takes_what_was_measured_for_the_gpu_and_the_scaling(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(small_layers, "MEASURED", {(9, 0): {"row": {0.1: 50, 0.2: 100}}})
    cuda = torch.device("cuda", 0)
    # Fabric converts a model before it moves it.
    assert small_layers.least_features("auto", resolve_recipe({"budget": 0.2}), torch.device("cpu"))[0] == 100
    assert small_layers.least_features("auto", resolve_recipe({"budget": 0.2}), cuda) == (
        100,
        "min_features='auto', 100 on sm_90",
    )
    band = {"budget": None, "activation_band": (0.05, 0.15), "gradient_band": (0.0, 0.1)}
    budget = {"budget": 0.1, "activation_band": (0.0, 0.4), "gradient_band": (0.0, 0.4)}
    for recipe in (band, budget, {"budget": None, "activation_band": (0.0, 0.0), "gradient_band": (0.0, 0.0)}):
        assert small_layers.least_features("auto", resolve_recipe(recipe), cuda)[0] == 50
    for recipe in (
        "block",
        {"block_size": 64},
        {"budget": None, "activation_band": (0.1, 0.3), "gradient_band": (0.2, 0.4)},
    ):
        least, source = small_layers.least_features("auto", resolve_recipe(recipe), cuda)
        assert least == small_layers.UNMEASURED
        assert "nothing was measured" in source
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert small_layers.least_features("auto", resolve_recipe("row"), cuda)[0] == small_layers.UNMEASURED


@pytest.mark.parametrize("wrong", [-1, True, "large", 2.5])
def test_anything_else_is_refused(wrong) -> None:
    with pytest.raises(ValueError, match=r"must be 'auto' or an integer of at least 0"):
        convert_to_int8(model(), min_features=wrong)
    with pytest.raises(ValueError, match="min_features"):
        FallbackInt8Precision(min_features=wrong)


def test_nothing_left_to_convert_is_an_error_that_names_the_fix() -> None:
    with pytest.raises(ValueError, match=r"below min_features=1000.*lower min_features"):
        convert_to_int8(model(), min_features=1000)
