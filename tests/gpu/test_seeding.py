"""The first step, in which one program of a launch seeds the threshold that all of them read."""

from __future__ import annotations

import pytest
import torch

from lightning_int8.kernels import ops

pytestmark = pytest.mark.gpu

TOKENS, FEATURES, RATE, CAPACITY, BLOCK = 16384, 768, 0.2, 600, 128


def quantize_input(x: torch.Tensor, state: torch.Tensor) -> list[torch.Tensor]:
    *_, slot, scale, int_max = ops.quantize_row(x, state, 0, RATE, CAPACITY, BLOCK, False, True, "triton")
    return [slot, scale, int_max]


def quantize_gradient(dy: torch.Tensor, state: torch.Tensor) -> list[torch.Tensor]:
    t, s, largest = dy.new_ones(FEATURES), dy.new_ones(TOKENS), dy.new_full((TOKENS,), 127.0)
    results = ops.quantize_row_gradient(
        dy, t.float(), s.float(), largest.float(), state, RATE, CAPACITY, BLOCK, False, "nothing", False, "triton", ()
    )
    return [results[i] for i in (2, 3, 6, 7)]


@pytest.mark.parametrize("quantize", [quantize_input, quantize_gradient])
def test_programs_agree_while_the_threshold_is_seeded(quantize):
    """Another stream seeds and clears it all the while: whatever a program reads, its warps must read the same."""
    g = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(TOKENS, FEATURES, device="cuda", generator=g)
    x = (x * torch.exp(torch.randn(x.shape, device="cuda", generator=g))).bfloat16()
    unseeded = torch.zeros(3, 5, device="cuda")
    unseeded[:, 0] = float("nan")
    seeded = unseeded.clone()
    # `update` seeds; AbsMax of the same tensor, so the same threshold.
    ops.quantize_row(x, seeded, 0, RATE, CAPACITY, BLOCK, True, False, "triton")
    ones = torch.ones(max(x.shape), device="cuda")
    ops.quantize_row_gradient(
        x, ones[:FEATURES], ones[:TOKENS], ones[:TOKENS] * 127, seeded, RATE, CAPACITY, BLOCK, True, "nothing", False,
        "triton", (),
    )  # fmt: skip
    assert seeded[:, 0].isfinite().all()
    expected = quantize(x, seeded.clone())
    assert all(map(torch.equal, quantize(x, unseeded.clone()), expected))
    state, wrong = unseeded.clone(), torch.zeros((), dtype=torch.long, device="cuda")
    # As one graph, so that the stores follow each other closely.
    toggling, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=toggling):
        for _ in range(500):
            state.copy_(seeded)
            state.copy_(unseeded)
    torch.cuda.synchronize()
    for _ in range(50):
        with torch.cuda.stream(toggling):
            graph.replay()
        for _ in range(10):
            for value, wanted in zip(quantize(x, state), expected, strict=True):
                wrong += (value != wanted).sum()
        torch.cuda.synchronize()
    assert wrong.item() == 0
