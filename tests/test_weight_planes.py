"""A weight is quantized once an optimizer step when its planes are kept, and nothing else changes."""

from __future__ import annotations

import dataclasses
import warnings
from types import ModuleType

import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

from lightning_int8 import (
    PRESETS,
    FabricFallbackInt8Precision,
    FallbackInt8Precision,
    Int8Recipe,
    convert_to_int8,
    hadamard_scheme,
)
from lightning_int8.kernels import ops
from lightning_int8.weight_planes import drop_weight_planes, keep_weight_planes
from tests.tiny import RECIPE, TinyModule, trainer

BLOCK = dataclasses.replace(PRESETS["block"], block_size=16)
FOLDED = dataclasses.replace(RECIPE, hadamard=False)
LAYERS = 5


@pytest.fixture
def weights_quantized(monkeypatch) -> list[tuple[int, ...]]:
    """Shapes of the weights that were quantized: what is quantized without fallback, for one GEMM or for both."""
    seen: list[tuple[int, ...]] = []

    def count(module: ModuleType, name: str) -> None:
        original = getattr(module, name)

        def counting(x, state, operand, rate, capacity, *rest):
            if capacity == 0:
                seen.append(tuple(x.shape))
            return original(x, state, operand, rate, capacity, *rest)

        monkeypatch.setattr(module, name, counting)

    count(ops, "quantize_row")
    count(ops, "quantize_block")
    count(hadamard_scheme, "quantize_mixed")
    scheme = hadamard_scheme.HadamardScheme
    transposed, mixed = ops.transposed_integers, scheme.quantize_weight_for_dgrad
    monkeypatch.setattr(ops, "transposed_integers", lambda x, *a: (seen.append(tuple(x.shape)), transposed(x, *a))[1])
    # Not its op, which quantizes dY as well where that has no dgrad.
    monkeypatch.setattr(
        scheme, "quantize_weight_for_dgrad", lambda self, w, *a: (seen.append(tuple(w.shape)), mixed(self, w, *a))[1]
    )
    return seen


def fit(tmp_path, accumulate: int, **plugin) -> TinyModule:
    module = TinyModule(steps=3 * accumulate)
    trainer(
        tmp_path, plugin=FallbackInt8Precision(**plugin), accumulate_grad_batches=accumulate, limit_val_batches=0
    ).fit(module)
    return module


@pytest.mark.strict
@pytest.mark.parametrize("recipe", [RECIPE, FOLDED, BLOCK])
def test_accumulated_training_quantizes_each_weight_once_a_step_with_equal_losses(tmp_path, weights_quantized, recipe):
    kept = fit(tmp_path, 4, recipe=recipe)
    assert len(weights_quantized) == 3 * LAYERS
    weights_quantized.clear()
    again = fit(tmp_path, 4, recipe=recipe, keep_weights=False)
    assert len(weights_quantized) == 3 * 4 * (2 * LAYERS - 1)  # the first layer needs no dX
    assert kept.losses == again.losses
    for ours, theirs in zip(kept.parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_without_accumulation_nothing_is_kept_unless_asked_for(tmp_path, weights_quantized):
    fit(tmp_path, 1, recipe=RECIPE)
    assert len(weights_quantized) == 3 * (2 * LAYERS - 1)
    weights_quantized.clear()
    fit(tmp_path, 1, recipe=RECIPE, keep_weights=True)
    assert len(weights_quantized) == 3 * LAYERS


def linear(recipe: Int8Recipe | str = RECIPE) -> nn.Linear:
    torch.manual_seed(0)
    module = nn.Linear(64, 48)
    convert_to_int8(module, recipe)
    return module


class SwiGLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(64, 80), nn.Linear(64, 80), nn.Linear(80, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def output(module: nn.Module) -> Tensor:
    return module(torch.randn(32, 64, generator=torch.Generator().manual_seed(1)))


@pytest.mark.strict
def test_planes_of_a_weight_that_changed_are_renewed():
    module = linear()
    keep_weight_planes(module)
    with torch.no_grad():
        module.weight.mul_(2)
    keep_weight_planes(module)
    kept = output(module)
    drop_weight_planes(module)
    assert torch.equal(kept, output(module))


@pytest.mark.strict
def test_evaluation_reads_the_weight_itself():
    module = linear()
    keep_weight_planes(module)
    module.weight.data.mul_(2)  # as exchanging averaged weights does: without PyTorch noticing
    with torch.no_grad():
        first = output(module)
    drop_weight_planes(module)
    with torch.no_grad():
        assert torch.equal(first, output(module))


@pytest.mark.strict
def test_a_frozen_weight_is_never_kept():
    module = linear().requires_grad_(False)
    keep_weight_planes(module)
    module.weight.data.mul_(0.5).add_(0.1)  # as averaging a teacher does: without PyTorch noticing
    read = output(module)
    module.int8_kept_weight = None
    assert torch.equal(read, output(module))


def test_a_weight_that_was_frozen_since_loses_its_planes():
    module = linear()
    keep_weight_planes(module)
    module.requires_grad_(False)
    drop_weight_planes(module)
    assert module.int8_kept_weight is None


def test_moving_the_layer_drops_its_planes():
    module = linear()
    keep_weight_planes(module)
    assert module.int8_kept_weight is not None
    assert module.to(torch.bfloat16).int8_kept_weight is None


@pytest.mark.strict
@pytest.mark.parametrize(
    ("recipe", "only_planes"),
    # LLM.int8()'s dgrad is in the input's dtype and takes the weight itself.
    [(RECIPE, True), (FOLDED, True), (BLOCK, True), ("rowwise", True), ("llm_int8", False)],
)
def test_kept_planes_change_neither_outputs_nor_gradients(recipe, only_planes):
    results = []
    for keep in (False, True):
        module = linear(recipe)
        x = torch.randn(32, 64, generator=torch.Generator().manual_seed(1), requires_grad=True)
        if keep:
            keep_weight_planes(module)
            if only_planes:  # both GEMMs must take what is kept, not what the weight has become unnoticed
                module.weight.data.mul_(2)
        y = module(x)
        y.square().sum().backward()
        results.append((y, x.grad, module.weight.grad, module.bias.grad))
    for apart, kept in zip(*results, strict=True):
        assert torch.equal(apart, kept)


@pytest.mark.strict
def test_compiled_in_one_graph_with_equal_gradients():
    eager, compiled = linear(), linear()
    graphs = []

    def backend(graph, example):
        graphs.append(graph)
        return graph

    compiled.compile(fullgraph=True, backend=backend)
    for _ in range(2):
        for module in (eager, compiled):
            keep_weight_planes(module)
            output(module).square().sum().backward()
            drop_weight_planes(module)
    assert torch.equal(eager.weight.grad, compiled.weight.grad)
    assert len(graphs) == 1


def test_an_unknown_value_is_refused():
    for plugin in (FallbackInt8Precision, FabricFallbackInt8Precision):
        with pytest.raises(ValueError, match=r"keep_weights='always'.*true, false or 'auto'"):
            plugin(keep_weights="always")


@pytest.mark.strict
@pytest.mark.parametrize("layer", ["linear", "fused SwiGLU"])
def test_a_weight_changed_inside_a_step_is_read_itself(layer):
    """As sharpness-aware minimization does: two forwards, the second with other weights, then these again."""
    torch.manual_seed(0)
    module = nn.Linear(64, 48) if layer == "linear" else SwiGLU()
    convert_to_int8(module, RECIPE)
    before, after = [], []
    for keep, seen in ((False, before), (True, after)):
        if keep:
            keep_weight_planes(module)
        for factor in (1, 2, 0.5):
            with torch.no_grad():
                for weight in module.parameters():
                    weight.mul_(factor)
            seen.append(output(module))
        drop_weight_planes(module)
    for apart, kept in zip(before, after, strict=True):
        assert torch.equal(apart, kept)


@pytest.mark.strict
def test_weights_passed_to_functional_call_are_read_themselves():
    module = linear()
    other = {"weight": torch.randn(48, 64), "bias": torch.zeros(48)}
    x = torch.randn(32, 64)
    apart = torch.func.functional_call(module, other, (x,))
    keep_weight_planes(module)
    assert torch.equal(torch.func.functional_call(module, other, (x,)), apart)


def weight_norm(module: nn.Linear) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(module)


@pytest.mark.parametrize(
    "make",
    [weight_norm, lambda m: prune.random_unstructured(m, "weight", 0.5), nn.utils.parametrizations.weight_norm],
)
@pytest.mark.parametrize("compiled", [False, True])
def test_a_weight_made_for_each_forward_is_never_kept(make, compiled):
    module = linear("rowwise")
    make(module)
    optimizer = torch.optim.SGD(module.parameters(), 30.0)
    torch._dynamo.reset()
    target = torch.compile(module, backend="aot_eager") if compiled else module
    for _ in range(3):
        x = torch.randn(32, 64)
        keep_weight_planes(module)
        assert module.int8_kept_weight is None
        y = target(x)
        expected = F.linear(x, module.weight, module.bias)
        assert torch.linalg.vector_norm(y - expected) < 0.02 * torch.linalg.vector_norm(expected)
        y.square().mean().backward()
        optimizer.step()


@pytest.mark.strict
def test_fabric_renews_planes_before_each_forward_also_of_compiled_layers():
    module = linear()
    fabric = Fabric(
        accelerator="cpu",
        plugins=FabricFallbackInt8Precision(recipe=RECIPE, precision="32-true", keep_weights=True),
    )
    torch._dynamo.reset()
    model, _ = fabric.setup(torch.compile(module, backend="aot_eager"), torch.optim.SGD(module.parameters(), 0.1))
    first = output(model)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(2)
    assert torch.equal(output(model), 2 * first)
