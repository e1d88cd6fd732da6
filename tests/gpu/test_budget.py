"""A budget on a GPU: no step waits for the device, and what it measures repeats, also in a CUDA graph."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lightning_int8 import convert_to_int8, fallback_states, update_thresholds
from lightning_int8.budget import COLUMNS, POWER
from lightning_int8.kernels.power import measure_gradient_power, measure_power
from lightning_int8.threshold import RATE
from tests.tiny import GPU_RECIPE, TinyModel, batches

pytestmark = pytest.mark.gpu
RECIPE = dataclasses.replace(GPU_RECIPE, budget=0.1, activation_band=(0.0, 0.4), gradient_band=(0.0, 0.4))


@pytest.mark.parametrize("scaling", ["row", "block"])
def test_steps_under_a_budget_never_wait_for_the_device(scaling):
    model = TinyModel(width=256).cuda()
    convert_to_int8(model, dataclasses.replace(RECIPE, scaling=scaling))
    x = batches(4)[0].repeat(1, 4).exp().cuda()

    def step() -> None:
        model(x.clone().requires_grad_()).square().mean().backward()
        update_thresholds(model)

    step()  # compiles, and copies what stays on the device
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name, state in fallback_states(model).items():
        assert state.tensor is not None
        assert (state.tensor[:, POWER] > 0).all(), name
        assert (state.tensor[:, RATE] <= 0.5).all(), name


@pytest.mark.parametrize("shape", [(32768, 768), (1000, 8192)])
def test_a_replayed_graph_measures_the_same_bits(shape):
    rows, columns = shape
    x = torch.randn(shape, device="cuda").bfloat16()
    s, t = torch.rand(rows, device="cuda"), torch.rand(columns, device="cuda")

    def measure(state: torch.Tensor, backend: str = "triton") -> None:
        measure_power(x, s, state, 0, backend)
        measure_gradient_power(x, t, s, s, t, state, backend)

    eager, replayed, wanted = (torch.zeros(3, COLUMNS, device="cuda") for _ in range(3))
    for _ in range(500):
        measure(eager)
        measure(wanted, "reference")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        measure(replayed)
    for _ in range(500):
        graph.replay()
    assert torch.equal(eager, replayed)
    torch.testing.assert_close(eager, wanted)
