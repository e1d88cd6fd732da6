"""The mean squares of a budget in one launch, against PyTorch's.

Without a GPU the kernel runs in Triton's interpreter, in a process of its own: see `interpreter`.
"""

from __future__ import annotations

import contextlib

import pytest
import torch

from tests.kernels.interpreter import interpreting, run_interpreted

INTERPRETED = interpreting(__file__)

if not INTERPRETED and not torch.cuda.is_available():

    def test_in_the_interpreter():
        run_interpreted(__file__)

else:
    from lightning_int8.kernels import power_reference, power_sums
    from lightning_int8.kernels.power import POWER_COUNT, measure_gradient_power, measure_power

    DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

    @pytest.fixture(autouse=True)
    def _few_programs(monkeypatch):
        if INTERPRETED:  # one after the other, so with more for each to do
            monkeypatch.setattr(power_sums, "_PROGRAMS", 8)

    def checked():
        if not INTERPRETED:
            return contextlib.nullcontext()
        from tests.kernels.bounds import checked_accesses

        return checked_accesses()

    def states(count: int = 2) -> list[torch.Tensor]:
        """With something in them already."""
        start = torch.arange(48.0, device=DEVICE).reshape(3, 16)
        return [start.clone() for _ in range(count)]

    def matrix(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        torch.manual_seed(rows)
        return (torch.randn(rows, columns) * 3).to(DEVICE, dtype)

    # One row; a transposed matrix and many scales; rows that are not read, and more than two a program; several steps
    # along the columns.
    CASES = [((1, 5), torch.float16), ((70, 50), torch.float64), ((511, 8), torch.float32), ((1300, 70), torch.float16)]
    CASES += [((20, 4200), torch.float32)]
    if not INTERPRETED:
        CASES += [((4096, 768), torch.bfloat16), ((32768, 2048), torch.bfloat16), ((700, 8192), torch.bfloat16)]

    @pytest.mark.parametrize(("shape", "dtype"), CASES)
    def test_equals_the_reference(shape, dtype):
        x = matrix(*shape, dtype)
        if shape[0] == 70:
            x = x.t().contiguous().t()
        rows, columns = shape
        t, s = torch.rand(columns, device=DEVICE), torch.rand(rows, device=DEVICE)
        a_step, g_step = (
            torch.rand(40_000 if rows == 70 else rows, device=DEVICE),
            torch.rand(3, columns, device=DEVICE),
        )
        wanted, got = states()
        power_reference.measure_power(x, a_step, wanted, 0)
        power_reference.measure_gradient_power(x, t, s, a_step, g_step, wanted)
        with checked():
            power_sums.measure_power(x, a_step, got, 0)
            power_sums.measure_gradient_power(x, t, s, a_step, g_step, got)
        torch.testing.assert_close(got, wanted)
        assert torch.equal(got[:, POWER_COUNT], wanted[:, POWER_COUNT])

    @pytest.mark.parametrize("which", [0, 1])
    def test_one_operand_of_the_backward(which):
        x = matrix(20, 30, torch.float16)
        scales = [torch.rand(30, device=DEVICE), torch.rand(20, device=DEVICE)]
        scales[1 - which] = None
        wanted, got = states()
        empty, step = torch.empty(0, device=DEVICE), torch.rand(7, device=DEVICE)
        steps = (step, empty) if which == 0 else (empty, step)
        power_reference.measure_gradient_power(x, *scales, *steps, wanted)
        with checked():
            power_sums.measure_gradient_power(x, *scales, *steps, got)
        torch.testing.assert_close(got, wanted)

    def test_block_has_no_scales_of_rows():
        x = matrix(20, 30, torch.float16)
        wanted, got = states()
        power_reference.measure_power(x, None, wanted, 1)
        power_sums.measure_power(x, None, got, 1)
        torch.testing.assert_close(got, wanted)

    def test_a_sum_repeats_and_the_next_one_adds_to_it():
        x, s = matrix(700, 300, torch.float16), torch.rand(700, device=DEVICE)
        t = torch.rand(300, device=DEVICE)
        first, second = states()
        times = 2 if INTERPRETED else 500
        for state in (first, second):
            for _ in range(times):
                measure_power(x, s, state, 0, "triton")
                measure_gradient_power(x, t, s, s, t, state, "triton")
        assert torch.equal(first, second)
        more = first - states(1)[0]
        assert (more[:, POWER_COUNT] == times).all()

    def test_what_is_not_finite_shows():
        x = matrix(40, 20, torch.float16)
        x[3, 3], x[5, 5] = float("nan"), float("inf")
        for row in (3, 5):
            (state,) = states(1)
            power_sums.measure_power(x[row : row + 1], None, state, 0)
            assert not state[0, 5].isfinite()
            assert state[0, POWER_COUNT] == POWER_COUNT + 1
