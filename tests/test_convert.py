"""Conversion: which layers, in place, what the report says, and every error."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn

from lightning_int8 import ConversionReport, Int8Linear, Int8Recipe, convert_to_int8, update_thresholds
from lightning_int8.kernels import backends
from lightning_int8.linear import is_plain_linear
from lightning_int8.names import collapse_indices, matches, strip_wrappers
from tests.tiny import RECIPE, TinyModel, assert_same, batches, thresholds


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("layers.1", "layers.1", True),
        ("layers.1", "model.layers.1.mlp.up_proj", True),
        ("layers.1", "layers.10", False),
        ("layers.1", "model.layers.10.mlp", False),
        ("layers.1*", "layers.10", True),
        ("lm_head", "model.lm_head", True),
        ("lm_head", "model.lm_head2", False),
        ("head", "lm_head", False),
        ("*head", "model.lm_head", True),
        ("model.lm_head", "lm_head", False),
        ("layers.*.mlp", "model.layers.3.mlp.up_proj", True),
        ("layers.[01].mlp", "layers.2.mlp", False),
        ("*.up_proj", "model.layers.3.mlp.up_proj", True),
        ("layers.0", "_orig_mod.layers._checkpoint_wrapped_module.0._fsdp_wrapped_module.up_proj", True),
        ("_orig_mod.layers.0", "layers.0", True),
        ("LM_HEAD", "lm_head", False),
    ],
)
def test_patterns(pattern, name, expected):
    assert matches(pattern, name) is expected


def test_names():
    assert strip_wrappers("a._orig_mod.b._fsdp_wrapped_module._checkpoint_wrapped_module.c") == "a.b.c"
    assert collapse_indices("model.layers.12.mlp.2a") == "model.layers.*.mlp.2a"


def test_conversion_is_in_place_and_keeps_everything_but_the_class():
    model = TinyModel()
    hook_calls = []
    model.lm_head.register_forward_hook(lambda *_: hook_calls.append(1))
    modules, parameters, keys = list(model.modules()), list(model.parameters()), list(model.state_dict())
    report = convert_to_int8(model, RECIPE)
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert list(model.state_dict()) == keys
    assert list(model.buffers()) == []
    assert [type(m) for m in (model.lm_head, model.layers[0].up_proj)] == [Int8Linear, Int8Linear]
    assert report.converted == report.newly_converted
    assert len(report.converted) == 5
    assert report.skipped == {}
    model(batches(1)[0])
    assert hook_calls == [1]
    assert "int8=Int8Recipe(block_size=16, " in repr(model.lm_head)


def test_state_dict_loads_strictly_both_ways():
    plain, int8 = TinyModel(), TinyModel()
    convert_to_int8(int8, RECIPE)
    plain.load_state_dict(int8.state_dict(), strict=True)
    assert_same(plain.state_dict(), int8.state_dict())
    int8.load_state_dict(TinyModel().state_dict(), strict=True)


def test_an_optimizer_made_before_trains_the_layers():
    model = TinyModel()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    convert_to_int8(model, RECIPE)
    before = model.lm_head.weight.clone()
    model(batches(1)[0]).square().mean().backward()
    optimizer.step()
    assert not torch.equal(before, model.lm_head.weight)


def test_second_call_reports_and_keeps_thresholds():
    model = TinyModel()
    first = convert_to_int8(model, RECIPE, ["lm_head"])
    model(batches(1)[0]).sum().backward()
    update_thresholds(model)
    before = thresholds(model)
    second = convert_to_int8(model, RECIPE, ["lm_head"])
    assert second.converted == first.converted
    assert second.newly_converted == ()
    assert {row.status for row in second.rows} == {"already converted", "ignored"}
    assert_same(before, thresholds(model))


def test_ignored_parent_and_segment():
    model = TinyModel(depth=12)
    report = convert_to_int8(model, RECIPE, ["layers.1", "lm_head"])
    assert list(report.skipped) == ["layers.1.up_proj", "layers.1.down_proj", "lm_head"]
    assert "layers.10.up_proj" in report.converted
    assert report.skipped["lm_head"] == "ignored by 'lm_head'"
    assert type(model.layers[1].up_proj) is nn.Linear


def test_a_module_with_two_names_is_converted_once_and_ignored_by_either():
    model = nn.ModuleDict({"encoder": nn.Linear(8, 8), "other": nn.Linear(8, 8)})
    model["decoder"] = model["encoder"]
    row = convert_to_int8(copy.deepcopy(model), RECIPE).rows[0]
    assert (row.name, row.shared) == ("encoder", ("decoder",))
    assert list(convert_to_int8(model, RECIPE, ["decoder"]).skipped) == ["encoder"]


def test_tied_weights_stay_tied_and_are_reported():
    model = nn.ModuleDict({"embed": nn.Embedding(32, 16), "lm_head": nn.Linear(16, 32, bias=False)})
    model["lm_head"].weight = model["embed"].weight
    report = convert_to_int8(model, RECIPE)
    assert model["lm_head"].weight is model["embed"].weight
    assert report.rows[0].shared == ("embed.weight",)


def test_the_module_itself_may_be_the_linear():
    linear = nn.Linear(16, 16)
    report = convert_to_int8(linear)
    assert type(linear) is Int8Linear
    assert report.converted == ("",)
    assert "(the module itself)" in _text(report)


class LoraLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class Conv1D(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(16, 16))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_what_is_not_an_exact_linear_is_skipped_with_the_reason():
    integer = nn.Linear(16, 16)
    integer.weight = nn.Parameter(torch.zeros(16, 16, dtype=torch.int8), requires_grad=False)
    model = nn.ModuleDict(
        {
            "lora": LoraLinear(16, 16),
            "conv": Conv1D(),
            "lazy": nn.LazyLinear(16),
            "integer": integer,
            "complex": nn.Linear(16, 16, dtype=torch.complex64),
            "empty": nn.Linear(16, 0),
            "bilinear": nn.Bilinear(4, 4, 4),
            "plain": nn.Linear(16, 16),
        }
    )
    report = convert_to_int8(model)
    assert report.converted == ("plain",)
    assert report.skipped == {
        "lora": "a subclass of nn.Linear (LoraLinear), whose own forward would be lost",
        "conv": "not an nn.Linear (tests.test_convert.Conv1D)",
        "lazy": "nn.LazyLinear without a shape yet: run one batch through the model first",
        "integer": "its weight is int8, not a real floating-point type",
        "complex": "its weight is complex64, not a real floating-point type",
        "empty": "empty (16 → 0)",
    }


def test_attention_and_encoder_layers_warn():
    model = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32))
    with (
        pytest.warns(UserWarning, match=r"0\.self_attn: nn\.MultiheadAttention"),
        pytest.warns(UserWarning, match=r"0: nn\.TransformerEncoderLayer.*set_fastpath_enabled\(False\)"),
    ):
        report = convert_to_int8(model, ignore_modules=["linear2"])
    assert report.skipped == {
        "0.self_attn.out_proj": "nn.MultiheadAttention reads its weight without calling it",
        "0.linear2": "ignored by 'linear2'",
    }


def test_wrapped_names_are_stripped(recwarn):
    model = TinyModel()
    model.layers[0] = torch.compile(model.layers[0])
    report = convert_to_int8(model, RECIPE, ["layers.0.up_proj"])
    assert list(report.skipped) == ["layers.0.up_proj"]
    assert "layers.0.down_proj" in report.converted


def test_errors_leave_the_model_as_it_was():
    model = TinyModel()
    with pytest.raises(ValueError, match=r"'layrs\.0' matches no module\. Names like it: layers\.0"):
        convert_to_int8(model, RECIPE, ["lm_head", "layrs.0"])
    with pytest.raises(ValueError, match=r"matches no module\. Print model.named_modules"):
        convert_to_int8(model, RECIPE, ["zzzzzz"])
    with pytest.raises(ValueError, match="none of its 5 linear layers qualifies"):
        convert_to_int8(model, RECIPE, ["*"])
    assert all(is_plain_linear(m) for m in model.modules() if isinstance(m, nn.Linear))


@pytest.mark.parametrize("recipe", ["row", {"preset": "block", "block_size": 32}])
def test_a_new_int8_linear_is_a_converted_one(recipe):
    torch.manual_seed(0)
    new = Int8Linear(48, 32, recipe=recipe)
    torch.manual_seed(0)
    converted = nn.Linear(48, 32)
    convert_to_int8(converted, recipe)
    assert repr(new) == repr(converted)
    x = torch.randn(16, 48)
    assert torch.equal(new(x), converted(x))
    assert thresholds(new).keys() == thresholds(converted).keys()
    assert convert_to_int8(new, recipe).rows[0].status == "already converted"
    meta = Int8Linear(48, 32, bias=False, device="meta", dtype=torch.bfloat16, recipe=recipe).to_empty(device="cpu")
    assert (meta.weight.dtype, meta.bias) == (torch.bfloat16, None)
    with pytest.raises(ValueError, match="Unknown recipe 'int4'"):
        Int8Linear(8, 8, recipe="int4")


def test_the_device_may_be_a_name():
    assert convert_to_int8(nn.Linear(16, 16), device="cpu").rows[0].backend == "reference"
    assert convert_to_int8(nn.Linear(16, 16), device="meta").rows[0].backend == "auto"


def test_errors_say_what_is_wrong():
    with pytest.raises(TypeError, match=r"takes a torch\.nn.Module, not type"):
        convert_to_int8(TinyModel)
    with pytest.raises(TypeError, match=r"must be a list of patterns, such as \['lm_head'\]"):
        convert_to_int8(TinyModel(), ignore_modules="lm_head")
    with pytest.raises(TypeError, match="must be a non-empty string"):
        convert_to_int8(TinyModel(), ignore_modules=[""])
    with pytest.raises(ValueError, match=r"it has no nn\.Linear layer"):
        convert_to_int8(nn.Sequential(nn.ReLU()))
    with pytest.raises(ValueError, match="Unknown recipe 'rows'"):
        convert_to_int8(TinyModel(), "rows")
    with pytest.raises(TypeError, match=r"takes an exact nn\.Linear, not LoraLinear"):
        Int8Linear.swap(LoraLinear(4, 4), Int8Recipe())


def test_another_recipe_or_ignoring_what_was_converted_is_an_error():
    model = TinyModel()
    convert_to_int8(model, "row")
    with pytest.raises(ValueError, match=r"recipe 'row', and now 'block' is asked for\. Build the model anew"):
        convert_to_int8(model, "block")
    with pytest.raises(ValueError, match="converted earlier, and the pattern 'lm_head'"):
        convert_to_int8(model, "row", ["lm_head"])
    with pytest.raises(ValueError, match="with backend 'reference' is asked for"):
        convert_to_int8(model, dataclasses.replace(Int8Recipe(), backend="reference"))


def test_parts_may_have_recipes_of_their_own():
    model = TinyModel()
    convert_to_int8(model.layers, "row")
    convert_to_int8(model.lm_head, "block")
    assert model.lm_head.int8_recipe.scaling == "block"
    assert model.layers[0].up_proj.int8_recipe.scaling == "row"


def _text(report: ConversionReport) -> str:
    from rich.console import Console

    console = Console(width=140)
    with console.capture() as capture:
        console.print(report.table())
    return capture.get()


def test_summary_and_table_collapse_repeated_layers():
    report = convert_to_int8(TinyModel(depth=24), RECIPE, ["lm_head", "layers.3", "layers.4"])
    summary = report.summary()
    assert "\n" not in summary
    assert "44 of 49 linear layers" in summary
    assert "reference kernels" in summary
    assert "layers.3.up_proj and 1 more (ignored by 'layers.3')" in summary
    assert "lm_head (ignored by 'lm_head')" in summary
    text = _text(report)
    assert "layers.*.up_proj ×22" in text
    assert "layers.3.up_proj" in text
    assert len(text.splitlines()) < 20
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.recipe = "x"


def test_the_report_names_the_kernels_of_the_device_the_model_will_run_on():
    report = convert_to_int8(nn.Sequential(nn.Linear(4, 4)), device=torch.device("meta"))
    assert [row.backend for row in report.rows] == ["auto"]
    assert [row.backend for row in convert_to_int8(nn.Sequential(nn.Linear(4, 4))).rows] == ["reference"]


@pytest.mark.parametrize("scaling", ["row", "block"])
def test_blocks_without_a_kernel_on_the_gpu_are_refused_at_conversion(monkeypatch, scaling):
    monkeypatch.setattr(backends, "_capability", lambda index: (8, 0))
    device = torch.device("cuda", 0)
    for size in (16, 256):
        model = nn.Sequential(nn.Linear(4, 4))
        with pytest.raises(ValueError, match=rf"block_size={size} has no kernel on cuda:0: backend 'triton'.*32, 64"):
            convert_to_int8(model, Int8Recipe(scaling=scaling, block_size=size), device=device)
        assert type(model[0]) is nn.Linear
    for size, backend, runs in ((32, "auto", "triton"), (128, "auto", "triton"), (16, "reference", "reference")):
        recipe = Int8Recipe(scaling=scaling, block_size=size, backend=backend)
        report = convert_to_int8(nn.Sequential(nn.Linear(4, 4)), recipe, device=device)
        assert [row.backend for row in report.rows] == [runs]
    with pytest.raises(RuntimeError, match="backend='hopper' cannot run on cuda:0"):
        convert_to_int8(nn.Sequential(nn.Linear(4, 4)), Int8Recipe(backend="hopper"), device=device)
