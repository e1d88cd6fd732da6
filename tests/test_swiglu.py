"""Fused SwiGLU layers: found by what they compute, equal to their layers one by one, and safe where that is not so."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import lightning_int8.fusion as fusion
from lightning_int8 import convert_to_int8, fallback_states, hadamard_scheme, update_thresholds
from lightning_int8.fusion import is_fused
from lightning_int8.kernels import ops
from lightning_int8.threshold import THRESHOLD
from lightning_int8.weight_planes import keep_weight_planes


class SwiGLU(nn.Module):
    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(48, 80, bias=bias), nn.Linear(48, 80, bias=bias)
        self.down_proj = nn.Linear(80, 48, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


BUDGET = {"budget": 0.1, "activation_band": (0.0, 0.3), "gradient_band": (0.0, 0.3)}
BANDS = {"budget": None, "activation_band": (0.1, 0.3), "gradient_band": (0.1, 0.3)}
NO_FALLBACK = {"budget": None, "activation_band": (0.0, 0.0), "gradient_band": (0.0, 0.0)}
FOLDED = {"hadamard": False}
GROUPS = {**FOLDED, "wgrad_group_tokens": 32}


def converted(cls: type[nn.Module] = SwiGLU, fuse: bool = True, bias: bool = False, **recipe: Any) -> nn.Module:
    torch.manual_seed(1)
    module = cls(bias)
    report = convert_to_int8(module, {"block_size": 16, "fuse_swiglu": fuse, **recipe})
    assert report.fused == (("",) if is_fused(module) else ())
    return module


def run(module: nn.Module, x: Tensor, forward=None, autocast: torch.dtype | None = None) -> list[Tensor]:
    x = x.clone().requires_grad_()
    module.zero_grad(set_to_none=True)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        y = (forward or module)(x)
    y.float().square().sum().backward()
    gradients = [p.grad for p in module.parameters() if p.requires_grad]
    states = [state.tensor.nan_to_num(-1) for state in fallback_states(module).values()]
    return [y.detach(), x.grad, *gradients, *states]


def assert_equal(wanted: list[Tensor], got: list[Tensor]) -> None:
    for i, (a, b) in enumerate(zip(wanted, got, strict=True)):
        assert a.dtype == b.dtype
        assert torch.equal(a, b), i


@pytest.fixture
def fused_calls(monkeypatch) -> list[int]:
    calls: list[int] = []
    original = fusion.int8_swiglu
    monkeypatch.setattr(fusion, "int8_swiglu", lambda *a: (calls.append(1), original(*a))[1])
    return calls


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize(
    ("bias", "recipe"),
    [
        (False, {}),
        (True, {}),
        (True, FOLDED),
        (True, {**FOLDED, "stochastic_rounding": "all"}),
        (False, BUDGET),
        (False, {**FOLDED, **BUDGET}),
        (True, GROUPS),
    ],
)
def test_equals_the_layers_one_by_one(fused_calls, bias, recipe, autocast):
    apart, fused = converted(fuse=False, bias=bias, **recipe), converted(bias=bias, **recipe)
    x = torch.randn(2, 20, 48)
    for _ in range(2):
        assert_equal(run(apart, x, autocast=autocast), run(fused, x, autocast=autocast))
    assert len(fused_calls) == 2
    assert fused.state_dict().keys() == SwiGLU(bias).state_dict().keys()


@pytest.mark.parametrize("frozen", [(), ("gate_proj", "up_proj"), ("down_proj",)])
@pytest.mark.parametrize("recipe", [{}, FOLDED])
def test_frozen_weights_and_inference(fused_calls, frozen, recipe):
    apart, fused = converted(fuse=False, **recipe), converted(**recipe)
    x = torch.randn(40, 48)
    for module in (apart, fused):
        for name in frozen:
            getattr(module, name).requires_grad_(False)
    assert_equal(run(apart, x), run(fused, x))
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert torch.equal(apart.eval()(x), fused.eval()(x))
    assert len(fused_calls) == 3


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("recipe", [{}, FOLDED])
def test_checkpointed_and_compiled(checkpointed, compiled, recipe):
    apart, fused = converted(fuse=False, **recipe), converted(**recipe)
    forward = (lambda t: checkpoint(fused, t, use_reentrant=False)) if checkpointed else lambda t: fused(t)
    if compiled:
        torch._dynamo.reset()
        forward = torch.compile(forward, backend="aot_eager", fullgraph=True)
    x = torch.randn(40, 48)
    for _ in range(2):
        assert_equal(run(apart, x), run(fused, x, forward))


RECOMPUTED = ["planes", "all"]


@pytest.mark.parametrize("what", ["nothing", *RECOMPUTED])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("recipe", [BUDGET, {**FOLDED, **BUDGET}])
def test_thresholds_under_a_budget_move_as_those_of_the_layers_one_by_one(fused_calls, what, checkpointed, recipe):
    apart, fused = converted(fuse=False, **recipe), converted(recompute_swiglu=what, **recipe)
    forward = (lambda t: checkpoint(fused, t, use_reentrant=False)) if checkpointed else None
    seen = []
    for seed in range(6):
        x = torch.randn(200, 48, generator=torch.Generator().manual_seed(seed)).exp()
        assert_equal(run(apart, x), run(fused, x, forward))
        for module in (apart, fused):
            update_thresholds(module)
        seen.append(fallback_states(fused)["down_proj"].tensor[:, THRESHOLD])
    assert len(fused_calls) == 6 * (1 + checkpointed)
    assert (seen[0] != seen[-1]).all()


@pytest.mark.parametrize("what", RECOMPUTED)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize(
    ("bias", "recipe"),
    [
        (True, {}),
        (True, FOLDED),
        (False, NO_FALLBACK),
        (False, {**FOLDED, **NO_FALLBACK}),
    ],
)
def test_what_is_computed_again_is_what_was_kept(what, bias, recipe, autocast):
    kept, recomputed = converted(bias=bias, **recipe), converted(bias=bias, recompute_swiglu=what, **recipe)
    x = torch.randn(2, 20, 48)
    for _ in range(2):
        assert_equal(run(kept, x, autocast=autocast), run(recomputed, x, autocast=autocast))


@pytest.mark.parametrize("what", RECOMPUTED)
@pytest.mark.parametrize("frozen", [("gate_proj", "up_proj"), ("down_proj",), ("gate_proj", "up_proj", "down_proj")])
@pytest.mark.parametrize("recipe", [{}, FOLDED])
def test_frozen_weights_with_what_is_computed_again(what, frozen, recipe):
    modules = converted(**recipe), converted(recompute_swiglu=what, **recipe)
    for module in modules:
        for name in frozen:
            getattr(module, name).requires_grad_(False)
    x = torch.randn(40, 48)
    assert_equal(run(modules[0], x), run(modules[1], x))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("keep_weights", [False, True])
@pytest.mark.parametrize("hadamard", [False, True])
def test_memory_of_what_is_computed_again(compiled, keep_weights, hadamard):
    """Also where the compiler sees equal products in the forward and the backward, which it would make one of."""
    results, saved = [], []
    x = torch.randn(128, 48)
    for what in ("nothing", *RECOMPUTED):
        module = converted(recompute_swiglu=what, hadamard=hadamard, **BANDS)
        run(module, x)  # seeds the thresholds
        if keep_weights:
            keep_weight_planes(module)
        forward = module.forward
        if compiled:
            torch._dynamo.reset()
            forward = torch.compile(module.forward, backend="aot_eager_decomp_partition", fullgraph=True)
        seen: dict[int, Tensor] = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, seen=seen: seen.setdefault(t.data_ptr(), t), lambda t: t
        ):
            results.append(run(module, x, forward))
        parameters = {p.data_ptr() for p in module.parameters()}
        saved.append(sum(t.nbytes for pointer, t in seen.items() if pointer not in parameters))
    assert_equal(results[0], results[1])
    assert_equal(results[0], results[2])
    elements = 128 * 80
    # The capacity for fallback blocks is 1.25 times the band's 0.3, in whole blocks.
    planes, gate_and_up = elements * 1.4, elements * 4 * 2
    if hadamard:
        # A scale a feature, no fallback; but X's operand of rows cannot be made of that of columns and is kept as well,
        # with its 48 features padded to 128.
        planes, gate_and_up = elements + 4 * 80, gate_and_up - (128 * 128 * 1.4 + 4 * 128)
    assert saved[0] - saved[1] == pytest.approx(planes, rel=0.02)
    assert saved[1] - saved[2] == pytest.approx(gate_and_up, rel=0.02)


@pytest.mark.parametrize(
    ("recipe", "module", "name", "times"),
    # Unmixed, one op makes the activation and its planes: one read less only counts if nobody quantizes it again.
    [({}, hadamard_scheme, "quantize_mixed", 1), (FOLDED, ops, "quantize_row", 0)],
)
@pytest.mark.parametrize("what", ["nothing", *RECOMPUTED])
def test_the_activation_and_its_planes_are_made_once(monkeypatch, recipe, module, name, times, what):
    layer, seen, original = converted(recompute_swiglu=what, **recipe), [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda x, *a: (seen.append(tuple(x.shape)), original(x, *a))[1])
    layer(torch.randn(40, 48))
    assert seen.count((40, 48)) == 1
    assert seen.count((40, 80)) == times


@pytest.mark.parametrize("other", [{"fuse_swiglu": False}, {"scaling": "block"}, {"wgrad": False}])
def test_nothing_can_be_computed_again_in_layers_that_are_not_fused(other):
    with pytest.raises(ValueError, match=r"recompute_swiglu='all' needs fused SwiGLU layers: fuse_swiglu=True"):
        converted(recompute_swiglu="all", **({"fuse": False} if "fuse_swiglu" in other else other))


@pytest.mark.parametrize("recipe", ["block", "jetfire", "rowwise", "llm_int8", {"wgrad": False}])
def test_recipes_that_never_fuse_report_nothing_fused(recipe):
    module = SwiGLU(False)
    report = convert_to_int8(module, recipe)
    assert report.fused == ()
    assert not is_fused(module)
    assert "fused" not in report.summary()


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen2"])
def test_layers_of_transformers(fused_calls, name):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name}Config")(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, hidden_act="silu",
    )  # fmt: skip
    torch.manual_seed(0)
    plain = getattr(transformers, f"{name}ForCausalLM")(config)
    outputs = []
    for fuse in (False, True):
        model = copy.deepcopy(plain)
        report = convert_to_int8(model, {"block_size": 16, "fuse_swiglu": fuse}, ignore_modules=["lm_head"])
        assert report.fused == (("model.layers.0.mlp",) if fuse else ())
        outputs.append(model(torch.arange(32).view(2, 16), labels=torch.arange(32).view(2, 16)).loss)
    assert fused_calls
    assert torch.equal(*outputs)
    assert "SwiGLU fused in model.layers.0.mlp" in report.summary()


class Gelu(SwiGLU):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x)) * self.up_proj(x))


class Scaled(SwiGLU):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x) * 2)


class OtherInput(SwiGLU):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x + 1))


class Keeping(SwiGLU):
    def forward(self, x: Tensor) -> Tensor:
        self.last = self.gate_proj(x)
        return self.down_proj(F.silu(self.last) * self.up_proj(x))


class Branching(SwiGLU):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else x


@pytest.mark.parametrize("cls", [Gelu, Scaled, OtherInput, Keeping, Branching])
def test_other_layers_are_left_alone(cls):
    module = converted(cls)
    assert not is_fused(module)
    assert type(module) is cls
    assert not hasattr(module, "last")


def hooked(module: nn.Module, name: str) -> list:
    seen: list = []
    getattr(module, name).register_forward_hook(lambda *a: seen.append(a))
    return seen


@pytest.mark.parametrize("name", ["up_proj", "down_proj"])
def test_hooks_on_a_projection_still_run(fused_calls, name):
    apart, fused = converted(fuse=False), converted()
    seen = hooked(fused, name)
    x = torch.randn(40, 48)
    assert_equal(run(apart, x), run(fused, x))
    assert len(seen) == 1
    assert not fused_calls


def test_a_replaced_projection_is_called(fused_calls):
    fused = converted()
    fused.up_proj = nn.Sequential(fused.up_proj, nn.Identity())
    apart = converted(fuse=False)
    x = torch.randn(40, 48)
    assert_equal(run(apart, x)[:2], run(fused, x)[:2])
    assert not fused_calls


def test_the_layers_own_errors_and_the_empty_batch(fused_calls):
    fused = converted()
    with pytest.raises(ValueError, match="47 features"):
        fused(torch.randn(4, 47))
    with pytest.raises(TypeError, match=r"x is torch.float16 but weight is torch.float32"):
        fused(torch.randn(4, 48).half())
    with pytest.raises(ValueError, match="scalar"):
        fused(torch.tensor(1.0))
    assert fused(torch.empty(0, 48)).shape == (0, 48)
    assert not fused_calls


def test_copies_and_pickles_stay_fused(fused_calls):
    fused = converted()
    x = torch.randn(40, 48)
    wanted = fused.eval()(x)
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert torch.equal(twin(x), wanted)
        assert isinstance(twin, SwiGLU)
    assert len(fused_calls) == 3


def test_differentiating_twice_raises():
    x = torch.randn(32, 48, requires_grad=True)
    layer = converted()
    with pytest.raises(RuntimeError, match="INT8 linear cannot be differentiated twice"):
        torch.autograd.grad(layer(x.tanh()).sum(), x, create_graph=True)
    (gradient,) = torch.autograd.grad(layer(x.tanh()).square().sum(), x, create_graph=True)
    for inputs in (None, [x], list(layer.parameters())):
        with pytest.raises(RuntimeError, match="INT8 linear cannot be differentiated twice"):
            gradient.square().sum().backward(inputs=inputs, retain_graph=True)
