"""The GPU's own kernels against the reference, integer for integer, and every gradient against float64."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

from lightning_int8 import PRESETS, FallbackState, Int8Recipe, int8_linear, update_thresholds
from lightning_int8.kernels import backends, ops
from lightning_int8.kernels.planes import QuantizedMatrix
from lightning_int8.threshold import COLUMNS
from tests.assertions import assert_close, sqnr_db

pytestmark = pytest.mark.gpu

SHAPES = [(1, 1, 1), (130, 576, 200), (1000, 704, 333), (2048, 2048, 1024)]
NATIVE = [b for b in backends.BACKENDS if b != "reference"]


def heavy_tailed(tokens: int, features_in: int, features_out: int, dtype=torch.bfloat16):
    g = torch.Generator("cuda").manual_seed(tokens)
    x = torch.randn(tokens, features_in, device="cuda", generator=g)
    x *= torch.exp(0.5 * torch.randn(x.shape, device="cuda", generator=g))
    x[:, : max(1, features_in // 64)] *= 20
    weight = torch.randn(features_out, features_in, device="cuda", generator=g) * 0.02
    dy = torch.randn(tokens, features_out, device="cuda", generator=g)
    dy *= torch.exp(torch.randn(tokens, 1, device="cuda", generator=g)) * 1e-3
    return x.to(dtype), weight.to(dtype), dy.to(dtype)


def skip_unless_it_runs(backend: str) -> None:
    reason = backends.why_not(backend, torch.device("cuda", 0))
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("recipe", ["row", "block", "jetfire", "rowwise"])
@pytest.mark.parametrize("backend", NATIVE)
def test_gradients_equal_the_reference_and_are_near_float64(backend, recipe, shape):
    skip_unless_it_runs(backend)
    x, weight, dy = heavy_tailed(*shape)
    bias = torch.randn(shape[2], device="cuda", dtype=x.dtype)
    results, states = {}, {}
    for which in (backend, "reference"):
        fields = {f: getattr(PRESETS[recipe], f) for f in Int8Recipe.__dataclass_fields__}
        chosen = Int8Recipe(**{**fields, "backend": which})
        state = FallbackState(chosen)
        tensors = [t.clone().requires_grad_() for t in (x, weight, bias)]
        y = int8_linear(*tensors, recipe=chosen, state=state)
        y.backward(dy)
        results[which] = [y.detach(), *[t.grad for t in tensors]]
        states[which] = state.tensor if state.operands else None
    exact = [
        x.double() @ weight.double().t() + bias.double(),
        dy.double() @ weight.double(),
        dy.double().t() @ x.double(),
        dy.double().sum(0),
    ]
    for name, value, reference, truth in zip(
        ("Y", "dX", "dW", "db"), results[backend], results["reference"], exact, strict=True
    ):
        # Row scaling is exact integers; block scaling may round its float32 sums in another order.
        assert_close(f"{name} against the reference", reference, value, 45)
        assert sqnr_db(truth, value) >= sqnr_db(truth, reference) - 0.1, name
    if states[backend] is not None:
        counts, sums = zip(*(s.nan_to_num(-1).tensor_split([COLUMNS], 1) for s in states.values()), strict=True)
        assert torch.equal(*counts)
        # What a budget weighs: sums in another order.
        torch.testing.assert_close(*sums)


@pytest.mark.parametrize("shape", [(130, 576, 200), (2048, 2048, 1024)])
@pytest.mark.parametrize("backend", NATIVE)
def test_row_gemm_is_bit_exact(backend, shape):
    """Forward, dgrad and wgrad forms with high bytes on either operand, float32 out: equal to the integers scaled."""
    skip_unless_it_runs(backend)
    x, weight, dy = heavy_tailed(*shape)
    tokens, features_in, features_out = shape
    blocks = -(-tokens // 128) * -(-features_in // 128)
    q = ops.quantize_row(x, None, 0, 0.3, max(1, blocks // 2), 128, False, True, "reference")
    low, low_t, high, high_t, slot, scale, int_max = q
    w_low, w_low_t, _, _, _, w_scale, _ = ops.quantize_row(weight, None, 0, 0.0, 0, 128, False, True, "reference")
    gblocks = -(-tokens // 128) * -(-features_out // 128)
    g = ops.quantize_row_gradient(
        dy, w_scale, scale, int_max, None, 0.3, max(1, gblocks // 2), 128, False, "nothing", False, "reference", ()
    )
    x_t = QuantizedMatrix(low_t, high_t, slot.t().contiguous(), None, (features_in, tokens), 128)
    pairs = {
        "forward": (
            QuantizedMatrix(low, high, slot, scale, (tokens, features_in), 128),
            QuantizedMatrix(w_low, None, None, w_scale, (features_out, features_in), 128),
        ),
        "dgrad": (
            QuantizedMatrix(g[0], g[1], g[2], g[3], (tokens, features_out), 128),
            QuantizedMatrix(w_low_t, None, None, None, (features_in, features_out), 128),
        ),
        "wgrad": (QuantizedMatrix(g[4], g[5], g[6], g[7], (features_out, tokens), 128), x_t),
    }
    for name, (a, b) in pairs.items():
        reference = ops.gemm_row(a, b, None, torch.float32, "reference")
        value = ops.gemm_row(a, b, None, torch.float32, backend)
        assert torch.equal(reference, value), (name, sqnr_db(reference, value))


@pytest.mark.parametrize("recipe", ["row", "block"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("backend", NATIVE)
def test_nan_and_inf_are_not_hidden(backend, recipe, bad):
    skip_unless_it_runs(backend)
    x, weight, dy = heavy_tailed(300, 256, 200)
    for where in range(3):
        tensors = [x.clone(), weight.clone(), dy.clone()]
        tensors[where][170, 90] = bad
        xb, wb = tensors[0].requires_grad_(), tensors[1].requires_grad_()
        y = int8_linear(xb, wb, recipe={"preset": recipe, "backend": backend})
        y.backward(tensors[2])
        exact = [
            xb.double() @ wb.double().t(),
            tensors[2].double() @ wb.double(),
            tensors[2].double().t() @ xb.double(),
        ]
        for reference, value in zip(exact, (y, xb.grad, wb.grad), strict=True):
            assert not (~reference.isfinite() & value.isfinite()).any()


def test_more_than_two_to_the_31_elements(measured):
    """X of 2³¹ + elements: 64-bit indexing, checked on its last rows."""
    free, _ = torch.cuda.mem_get_info()
    if free < 40 * 2**30:
        pytest.skip(f"needs 40 GiB of GPU memory, {free / 2**30:.0f} are free")
    tokens, features = 32768, 65664
    x = torch.randn(tokens, features, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(128, features, device="cuda", dtype=torch.bfloat16) * 0.02
    y = int8_linear(x, weight.requires_grad_(), recipe={"backend": "triton"})
    y.float().square().mean().backward()
    tail = slice(-300, None)
    measured(
        "SQNR of the last rows of 2^31 elements", f"{sqnr_db(x[tail].double() @ weight.double().t(), y[tail]):.1f} dB"
    )
    assert_close("Y", x[tail].double() @ weight.detach().double().t(), y[tail].detach(), 30)
    assert weight.grad.isfinite().all()


def test_saved_for_backward_is_less_than_bf16(measured):
    """Peak memory between forward and backward of one SwiGLU block, against BF16's."""
    from torch import nn

    from lightning_int8 import convert_to_int8

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj = (nn.Linear(2048, 8192, bias=False) for _ in range(2))
            self.down_proj = nn.Linear(8192, 2048, bias=False)

        def forward(self, x):
            return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))

    def saved_bytes(module) -> int:
        x = torch.randn(16384, 2048, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for _ in range(2):
            module(x).sum().backward()
        torch.cuda.synchronize()
        module.zero_grad(set_to_none=True)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        y = module(x)
        held = torch.cuda.memory_allocated() - before
        y.sum().backward()
        measured(type(module).__name__ + " peak", f"{torch.cuda.max_memory_allocated() / 2**20:.0f} MiB")
        return held

    bf16, int8 = (Block().cuda().bfloat16() for _ in range(2))
    convert_to_int8(int8)
    plain, quantized = saved_bytes(bf16), saved_bytes(int8)
    measured("held between forward and backward, BF16", f"{plain / 2**20:.0f} MiB")
    measured("held between forward and backward, INT8 row", f"{quantized / 2**20:.0f} MiB")
    assert quantized < plain


def test_compiled_linear_equals_eager_and_moves_thresholds(measured):
    x, weight, dy = heavy_tailed(2048, 1024, 512)
    eager_state, state = FallbackState(PRESETS["row"]), FallbackState(PRESETS["row"])
    state.on(x.device)
    compiled = torch.compile(lambda a, b: int8_linear(a, b, state=state), fullgraph=True)
    for _ in range(3):
        outs = []
        for f in (lambda a, b: int8_linear(a, b, state=eager_state), compiled):
            xc, wc = x.clone().requires_grad_(), weight.clone().requires_grad_()
            f(xc, wc).backward(dy)
            outs.append((xc.grad, wc.grad))
        for a, b in zip(*outs, strict=True):
            assert torch.equal(a, b)
        update_thresholds([eager_state])
        update_thresholds([state])
        assert torch.equal(eager_state.tensor, state.tensor)


def hazards_outside_dispatch(report: str) -> list[tuple[str, int]]:
    """The (kernel, shared address) of each race hazard but those in the bytes of ``gl.warp_specialize``'s own dispatch.

    Racecheck reports reads of those bytes by workers after writes by the default warps. In the machine code a barrier
    of all warps (``BAR.SYNC 1``, no thread count) lies between every such write and read (docs/log.md).
    """
    dispatch = [(m[1], range(int(m[2]), int(m[3]))) for m in re.finditer(r"^dispatch (\w+) (\d+) (\d+)$", report, re.M)]
    pattern = r"hazard detected at __shared__ (0x[0-9a-f]+)[^\n]*\n=+\s+\w+ Thread \([^)]*\) at (\w+)\+"
    hazards = [(kernel, int(address, 16)) for address, kernel in re.findall(pattern, report)]
    (counted,) = re.findall(r"RACECHECK SUMMARY: (\d+) hazards? displayed", report)
    assert len(hazards) == int(counted), report[-3000:]
    return [(kernel, at) for kernel, at in hazards if not any(kernel == k and at in where for k, where in dispatch)]


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
@pytest.mark.parametrize("backend", NATIVE)
def test_compute_sanitizer_finds_nothing(backend, tool, measured):
    skip_unless_it_runs(backend)
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not os.path.exists(sanitizer):
        pytest.skip("compute-sanitizer is not installed")
    command = [
        sanitizer,
        "--tool",
        tool,
        *(["--racecheck-report", "hazard", "--print-limit", "100000"] if tool == "racecheck" else []),
        "--error-exitcode",
        "99",
        sys.executable,
        "-m",
        "tests.gpu.small_run",
        backend,
    ]
    # PyTorch's caching allocator would hide an access past a tensor's end inside its own large blocks.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280, check=False)
    tail = (done.stdout + done.stderr)[-3000:]
    if tool == "racecheck":
        assert done.returncode in (0, 99), tail
        assert not hazards_outside_dispatch(done.stdout), tail
    else:
        assert done.returncode == 0, tail
    assert "small run: ok" in done.stdout
    summary = next((line for line in reversed(tail.splitlines()) if "ERROR SUMMARY" in line or "RACECHECK" in line), "")
    measured(f"{backend} {tool}", summary.replace("=", "").strip())
