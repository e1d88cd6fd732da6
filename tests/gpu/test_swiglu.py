"""The fused SwiGLU layer on the GPU: every bit of PyTorch's activation, and the layers one by one."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_int8 import convert_to_int8, fallback_states
from lightning_int8.fusion import is_fused
from lightning_int8.kernels import swiglu

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_gate_there_is(dtype):
    """All 65,536 values of a 16-bit gate, NaN and infinities among them, equal PyTorch's silu and silu_backward."""
    gate = torch.arange(65536, device="cuda").to(torch.int16).view(dtype).view(256, 256)
    up, dh = (torch.randn(256, 256, device="cuda").to(dtype) for _ in range(2))
    h = swiglu.swiglu_row(gate, up, None, 0, 0.2, 2, 128, False, False)[0]
    t, s = torch.ones(256, device="cuda"), torch.ones(256, device="cuda")
    dgate, dup, *_ = swiglu.swiglu_gradient(dh, gate, up, t, t, s, s, 2, 128, False)
    wanted = F.silu(gate) * up, torch.ops.aten.silu_backward(dh * up, gate), dh * F.silu(gate)
    for name, a, b in zip(("h", "dgate", "dup"), wanted, (h, dgate, dup), strict=True):
        differs = (a != b) & ~(a.isnan() & b.isnan())
        assert not differs.any(), (name, gate[differs][:5], a[differs][:5], b[differs][:5])


class SwiGLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(576, 1408, bias=False), nn.Linear(576, 1408, bias=False)
        self.down = nn.Linear(1408, 576, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


@pytest.mark.parametrize("recompute", ["nothing", "planes", "all"])
@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_equals_the_layers_one_by_one(backend, recompute):
    results = []
    for options in ({"fuse_swiglu": False}, {"recompute_swiglu": recompute}):
        torch.manual_seed(0)
        module = SwiGLU().cuda()
        convert_to_int8(module, {"backend": backend, **options})
        assert is_fused(module) == ("recompute_swiglu" in options)
        x = torch.randn(1000, 576, device="cuda", requires_grad=True)
        for _ in range(2):
            with torch.autocast("cuda", torch.bfloat16):
                y = module(x)
            y.float().square().mean().backward()
        states = [state.tensor for state in fallback_states(module).values()]
        results.append([y.detach(), x.grad, *[p.grad for p in module.parameters()], *states])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a.nan_to_num(-1), b.nan_to_num(-1))
