"""Linears that read the same tensor share its planes: eager, checkpointed, compiled, and in what is saved."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from lightning_int8 import convert_to_int8, fallback_states, hadamard_scheme
from lightning_int8.kernels import ops


class Attention(nn.Module):
    """Three linears that read the same tensor, and one that does not."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(width, width, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.o_proj(self.q_proj(x) * self.k_proj(x) + self.v_proj(x))


# Which op quantizes X: that of mixed operands, or of those that all GEMMs share.
RECIPES = [{}, {"hadamard": False}]
BANDS = {"budget": None, "activation_band": (0.1, 0.3), "gradient_band": (0.1, 0.3)}


@pytest.fixture
def calls(monkeypatch) -> list[tuple[int, ...]]:
    """Shapes of the activations that were quantized: what has fallback and is operand 0."""
    seen: list[tuple[int, ...]] = []

    def count(module: ModuleType, name: str) -> None:
        original = getattr(module, name)

        def counting(x, state, operand, seed_rate, capacity, *rest):
            if capacity and operand == 0:
                seen.append(tuple(x.shape))
            return original(x, state, operand, seed_rate, capacity, *rest)

        monkeypatch.setattr(module, name, counting)

    count(ops, "quantize_row")
    count(hadamard_scheme, "quantize_mixed")
    return seen


def run(module: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    module.zero_grad(set_to_none=True)
    y = module(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *[p.grad for p in module.parameters()]]


def converted(share: bool = True, **recipe: Any) -> Attention:
    torch.manual_seed(1)
    module = Attention()
    convert_to_int8(module, {"block_size": 16, **recipe})
    if not share:
        for child in module.children():
            child.int8_shares_input = False
    return module


@pytest.mark.parametrize("recipe", RECIPES)
def test_siblings_quantize_their_input_once(calls, recipe):
    x = torch.randn(32, 64)
    shared = run(converted(**recipe), x)
    assert len(calls) == 2  # one for q, k and v, one for o
    apart = run(converted(share=False, **recipe), x)
    assert len(calls) == 2 + 4
    for a, b in zip(shared, apart, strict=True):
        assert torch.equal(a, b)


def test_nothing_is_kept_after_the_forward():
    x = torch.randn(32, 64, requires_grad=True)
    converted()(x).sum().backward()
    assert set(vars(x)) <= {"grad"}


def test_an_input_changed_in_place_is_quantized_again(calls):
    class Changing(Attention):
        def forward(self, x: Tensor) -> Tensor:
            x = x * 1
            first = self.q_proj(x)
            x.mul_(2)
            return first + self.k_proj(x)

    module = Changing()
    convert_to_int8(module, {"block_size": 16})
    with torch.no_grad():
        module(torch.randn(32, 64))
    assert len(calls) == 2


def test_a_failed_forward_does_not_leak_into_the_next(calls):
    module = converted()
    x = torch.randn(32, 64)
    with pytest.raises(ValueError, match="features"):
        module(torch.randn(32, 63))
    run(module, x)
    assert len(calls) == 2


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("recipe", RECIPES)
def test_checkpointing_shares_in_both_runs(calls, reentrant, recipe):
    x = torch.randn(32, 64)
    plain, module = run(converted(**recipe), x), converted(**recipe)
    calls.clear()
    xc = x.clone().requires_grad_()
    y = checkpoint(module, xc, use_reentrant=reentrant)
    y.square().sum().backward()
    assert len(calls) == 4
    for a, b in zip(plain, [y.detach(), xc.grad, *[p.grad for p in module.parameters()]], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_compiled_module_quantizes_once_and_saves_once(checkpointed):
    counter = CompileCounterWithBackend("aot_eager")
    x = torch.randn(32, 64)
    eager, module = converted(), converted()
    torch._dynamo.reset()
    target = (lambda t: checkpoint(module, t, use_reentrant=False)) if checkpointed else lambda t: module(t)
    compiled = torch.compile(target, backend=counter, fullgraph=True)
    for _ in range(2):
        module.zero_grad(set_to_none=True)
        xc = x.clone().requires_grad_()
        y = compiled(xc)
        y.square().sum().backward()
        for a, b in zip(run(eager, x), [y, xc.grad, *[p.grad for p in module.parameters()]], strict=True):
            assert torch.equal(a, b)
    assert counter.frame_count == 1
    # Weights are quantized inside the autograd functions, whose graphs are others.
    quantizing = [
        node
        for graph in counter.graphs[0].modules()
        if isinstance(graph, torch.fx.GraphModule)
        for node in graph.graph.nodes
        if "quantize_mixed" in str(node.target) and node.args[2] == 0 and node.args[4] > 0
    ]
    assert len(quantizing) == 2  # one for q, k and v, one for o
    for name, state in fallback_states(eager).items():
        assert torch.equal(state.tensor.nan_to_num(-1), fallback_states(module)[name].tensor.nan_to_num(-1)), name


@pytest.mark.parametrize(("recipe", "most"), [({}, 1), ({"hadamard": False, **BANDS}, 1.4)])
def test_what_is_saved_for_backward_is_shared(recipe, most):
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.int8:
            saved[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    module = converted(**recipe)
    x = torch.randn(128, 64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        module(x)
    # Two activations of 128 × 64, each as its transposed base plane, and unmixed up to 0.375 of it for fallback blocks.
    assert 2 * 128 * 64 <= sum(saved.values()) <= 2 * 128 * 64 * most


class Residual(nn.Module):
    """Two linears, between which the tensor that both read is changed in place, in a way of its own."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.a, self.b = way, nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        first = self.a(x)
        if self.way == "residual":
            x += 3 * first
        elif self.way == "method":
            x.mul_(-1)
        elif self.way == "through a view":
            x.view(-1).neg_()
        elif self.way == "out":
            torch.neg(x, out=x)
        else:
            torch._dynamo.graph_break()
            x.neg_()
            torch._dynamo.graph_break()
        return first + self.b(x)


@pytest.mark.strict
@pytest.mark.parametrize("backend", [None, "eager", "aot_eager"])
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("way", ["residual", "method", "through a view", "out", "between graphs"])
def test_what_changes_in_place_between_siblings_is_quantized_again(way, mode, backend):
    torch.manual_seed(1)
    plain, module = Residual(way), Residual(way)
    module.load_state_dict(plain.state_dict())
    convert_to_int8(module, "row")
    torch._dynamo.reset()
    with mode():
        x = torch.randn(32, 64)
        target = torch.compile(module, backend=backend) if backend else module
        expected, y = plain(x.clone()), target(x.clone())
    assert torch.linalg.vector_norm(y - expected) < 0.02 * torch.linalg.vector_norm(expected)


def test_evaluation_without_gradients_shares(calls):
    with torch.no_grad():
        converted().eval()(torch.randn(32, 64))
    assert len(calls) == 2


@pytest.mark.parametrize("inputs", ["arguments", "keywords", "a dict", "linears called from outside"])
def test_nothing_is_left_on_a_tensor_of_the_users(calls, inputs):
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, batch: Any) -> Tensor:
            x = batch["x"] if isinstance(batch, dict) else batch
            return self.a(x) + self.b(x)

    module = Pair()
    convert_to_int8(module, {"block_size": 16})
    x = torch.randn(32, 64)
    for _ in range(2):
        if inputs == "arguments":
            module(x)
        elif inputs == "keywords":
            module(batch=x)
        elif inputs == "a dict":
            module({"x": x})
        else:
            module.a(x), module.b(x)
    assert not vars(x)
    # What is not an argument is quantized by each linear, which so counts blocks in every step.
    assert len(calls) == (2 if inputs in ("arguments", "keywords") else 4)


def test_threads_and_repeated_calls_get_the_same_planes():
    class Threaded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            with ThreadPoolExecutor(4) as pool:
                outs = list(pool.map(lambda linear: linear(x), [self.a, self.b] * 4))
            return sum(outs) + self.a(x) + self.b(x)

    torch.manual_seed(1)
    module = Threaded()
    convert_to_int8(module, {"block_size": 16})
    x = torch.randn(32, 64)
    module.a(x)  # seeds the threshold of the first, whichever that is
    module.b(x)
    assert torch.allclose(module(x), 5 * (module.a(x) + module.b(x)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strict", [False, True])
def test_a_group_can_be_exported(strict):
    module, x = converted().eval(), torch.randn(32, 64)
    exported = torch.export.export(module, (x,), strict=strict).module()
    assert torch.allclose(exported(x), module(x), rtol=1e-5, atol=1e-5)
