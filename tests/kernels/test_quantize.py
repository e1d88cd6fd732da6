"""The Triton quantize kernels against the reference: integers, slots, scales and states bit for bit.

Without a GPU they run in Triton's interpreter, in a process of its own: see `interpreter`.
"""

from __future__ import annotations

import pytest
import torch

from tests.kernels.interpreter import interpreting, run_interpreted

INTERPRETED = interpreting(__file__)

if not INTERPRETED and not torch.cuda.is_available():

    def test_in_the_interpreter():
        run_interpreted(__file__)

else:
    from hypothesis import HealthCheck, Phase, example, given, settings
    from hypothesis import strategies as st

    from lightning_int8.kernels import quantize, reference
    from lightning_int8.kernels.planes import MIN_SCALE, blocks_along
    from lightning_int8.kernels.quantize_gradient import quantize_row_gradient
    from lightning_int8.kernels.rounding import data_seed, uniform
    from lightning_int8.kernels.select import matrix_select
    from tests.assertions import EXACT, assert_close

    DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
    EXAMPLES = settings(
        max_examples=60,
        # The interpreter is slow: a failing case is shown as it is.
        phases=(Phase.explicit, Phase.generate),
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )
    KINDS = ("normal", "outliers", "zeros", "huge", "denormal", "non-finite", "ties", "largest")
    LAYOUTS = ("contiguous", "transposed", "strided")
    cases = st.fixed_dictionaries(
        {
            "rows": st.integers(1, 70),
            "columns": st.integers(1, 80),
            "block": st.sampled_from((32, 32, 64)),
            "dtype": st.sampled_from((torch.bfloat16, torch.float16, torch.float32, torch.float64)),
            "kind": st.sampled_from(KINDS),
            "layout": st.sampled_from(LAYOUTS),
            "state": st.sampled_from((None, float("nan"), 0.0, 1.0, float("inf"))),
            "seed_rate": st.sampled_from((0.0, 0.2, 0.5, 1.0)),
            "capacity": st.sampled_from((0, 1, 3, 100)),
            "update": st.booleans(),
        }
    )
    ATTACK = {
        "rows": 33,
        "columns": 70,
        "block": 32,
        "dtype": torch.float32,
        "kind": "largest",
        "layout": "contiguous",
        "state": 0.0,
        "seed_rate": 1.0,
        "capacity": 100,
        "update": True,
    }

    @pytest.fixture(autouse=True)
    def poison(monkeypatch):
        """Memory that the launchers allocate holds NaN, or integers that make a wild index."""
        empty = torch.empty

        def poisoned(*args, **kwargs):
            out = empty(*args, **kwargs)
            return out.fill_(float("nan") if out.is_floating_point() else torch.iinfo(out.dtype).max)

        monkeypatch.setattr(torch, "empty", poisoned)

    def tensor(rows, columns, dtype, kind, layout, **_):
        """A matrix on the CPU in float32 and the same on the device."""
        torch.manual_seed(rows * 1000 + columns)
        x = torch.randn(rows, columns, dtype=torch.float64) * torch.randn(rows, 1, dtype=torch.float64).exp()
        if kind == "outliers":
            x[torch.rand_like(x) < 0.01] *= 300
        elif kind == "zeros":
            x.zero_()
        elif kind == "huge":
            x *= 1e4 if dtype is torch.float16 else 1e30
        elif kind == "denormal":
            x *= 1e-41
        elif kind == "non-finite":
            for value in (float("nan"), float("inf"), -float("inf")):
                x[torch.rand_like(x) < 0.001] = value
            x[rows // 2, columns // 2] = float("nan")
        elif kind == "ties":
            x = (torch.randint(-254, 255, (rows, columns)) / 2).double()
        elif kind == "largest":
            x = torch.full_like(x, torch.finfo(torch.float32 if dtype is torch.float64 else dtype).max)
        x = x.to(dtype)
        if INTERPRETED and dtype is torch.bfloat16:
            # The interpreter's conversion takes the least bfloat16 denormals for zeros.
            x[x.float().abs() < 2**-126] = 0
        device = x.to(DEVICE)
        if layout == "transposed":
            device = device.t().contiguous().t()
        elif layout == "strided":
            device = torch.zeros(rows, 3 * columns + 1, dtype=dtype, device=DEVICE)[:, 1::3].copy_(device)
        return x.float(), device

    def states(case):
        if case["state"] is None:
            return None, None
        state = torch.tensor([[case["state"], 3.0, 9.0, 0.25]]).repeat(3, 1)
        return state, state.to(DEVICE)

    def used(plane, slot):
        return plane[: int((slot >= 0).sum())].cpu()

    def check_row_operand(name, x, wanted, got, block, other_max, folded, noise, small_only=False):
        """Scales equal unless the INT32 bound binds; integers equal, given the scales."""
        (low, high, slot, scale), (g_low, g_high, g_slot, g_scale) = wanted, [t.cpu() for t in got]
        assert_close(f"{name} slot", slot, g_slot, EXACT, check_dtype=True)
        mask = slot >= 0
        unbound = reference.row_scale(x, mask, block, torch.zeros(x.shape[1]), folded)
        differs = (scale != g_scale) & ~(scale.isnan() & g_scale.isnan())
        assert (torch.maximum(scale, g_scale)[differs] > unbound[differs]).all(), f"{name}: scales that nothing excuses"
        torch.testing.assert_close(g_scale[differs], scale[differs], rtol=1e-5, atol=0, msg=f"{name}: bound scales")
        if differs.any():
            q = reference.row_integers(x, g_scale, mask, block, noise, small_only)
            q_low, q_high = reference.split_bytes(q)
            low, high = reference._pad_columns(q_low, block), reference._gather_blocks(q_high, slot, len(high), block)
        assert_close(f"{name} low", low, g_low, EXACT, check_dtype=True)
        assert g_high.shape == high.shape
        assert_close(f"{name} high", used(high, slot), used(g_high, slot), EXACT, check_dtype=True)

    @EXAMPLES
    @given(cases, st.booleans())
    @example(ATTACK, True)
    def test_quantize_row(case, transpose):
        x, device = tensor(**case)
        state, device_state = states(case)
        rest = case["seed_rate"], case["capacity"], case["block"], case["update"], transpose
        wanted = reference.quantize_row(x, state, 1, *rest)
        got = [t.cpu() for t in quantize.quantize_row(device, device_state, 1, *rest)]
        low, _, high, _, slot, scale, _ = wanted
        check_row_operand(
            "x", x, (low, high, slot, scale), (got[0], got[2], *got[4:6]), case["block"], None, True, None
        )
        assert [t.shape for t in got] == [t.shape for t in wanted]
        if transpose:
            again = reference._transposed(got[0][:, : x.shape[1]], got[2], case["block"])
            assert_close("low_t", again[0], got[1], EXACT)
            assert_close("high_t", used(again[1], slot), used(got[3], slot), EXACT)
        q = reference.row_integers(x, got[5], slot >= 0, case["block"], None)
        assert_close("int_max", q.abs().amax(1).float(), got[6], EXACT, check_dtype=True)
        if state is not None:
            assert_close("state", state, device_state, EXACT)

    @EXAMPLES
    @given(
        cases,
        st.sampled_from(("nothing", "small", "all")),
        st.sampled_from(("both", "dgrad", "wgrad", "neither")),
        st.booleans(),
    )
    @example(ATTACK, "all", "both", True)
    def test_quantize_row_gradient(case, stochastic, wanted_operands, bias):
        dy, device = tensor(**case)
        state, device_state = states(case)
        rows, columns, block = case["rows"], case["columns"], case["block"]
        t = torch.rand(columns) if wanted_operands in ("both", "dgrad") else None
        s = m = None
        if wanted_operands in ("both", "wgrad"):
            s, m = torch.rand(rows), torch.randint(0, 32513, (rows,)).float()
        rest = case["seed_rate"], case["capacity"], block, case["update"], stochastic, bias
        folds = [None if f is None else f.to(DEVICE) for f in (t, s, m)]
        wanted = reference.quantize_row_gradient(dy, t, s, m, state, *rest)
        got = quantize_row_gradient(device, *folds, device_state, *rest)
        assert [(v.shape, v.dtype) for v in got] == [(v.shape, v.dtype) for v in wanted]
        for name, fold, part, value in (
            ("dgrad", t, slice(0, 4), dy * t if t is not None else None),
            ("wgrad", s, slice(4, 8), (dy * s[:, None]).t() if s is not None else None),
        ):
            if fold is not None:
                noise = None
                if stochastic == "all" or (stochastic == "small" and name == "wgrad"):
                    noise = uniform(*value.shape, data_seed(reference.block_amax(value, block)), value.device)
                other_max = m if name == "wgrad" else None
                check_row_operand(
                    name, value, wanted[part], got[part], block, other_max, False, noise, stochastic == "small"
                )
        if case["kind"] not in ("non-finite", "largest"):
            assert_close("dbias", dy.double().sum(0), got[8], 90) if bias else None
        if state is not None:
            assert_close("state", state, device_state, EXACT)

    @pytest.mark.parametrize(("rows", "group_blocks"), [(200, 1), (200, 2), (200, 3), (200, 9), (31, 1)])
    def test_groups_of_blocks_have_scales_of_their_own(rows, group_blocks):
        dy, device = tensor(rows, 70, torch.float32, "outliers", "contiguous")
        t, s, m = torch.rand(70), torch.rand(rows), torch.full((rows,), 127.0)
        rest = None, 0.2, 9, 32, False, "nothing", True, (), group_blocks
        wanted = reference.quantize_row_gradient(dy, t, s, m, *rest)
        got = quantize_row_gradient(device, t.to(DEVICE), s.to(DEVICE), m.to(DEVICE), *rest)
        assert wanted[7].shape == (-(-blocks_along(rows, 32) // group_blocks), 70)
        for i, (a, b) in enumerate(zip(wanted[:8], got[:8], strict=True)):
            slot = wanted[2 if i < 4 else 6]
            a, b = (used(a, slot), used(b, slot)) if i in (1, 5) else (a, b.cpu())
            assert_close(str(i), a, b, EXACT, check_dtype=True)
        alone = reference.quantize_row_gradient(dy, t, s, m, *rest[:-1])
        assert torch.equal(alone[0], wanted[0])
        if len(wanted[7]) > 1:
            assert (wanted[7] < alone[7]).any()
        assert torch.equal(wanted[7].amax(0), alone[7])

    @EXAMPLES
    @given(cases, st.booleans(), st.sampled_from(("nothing", "small", "all")))
    def test_quantize_block(case, transpose, stochastic):
        x, device = tensor(**case)
        state, device_state = states(case)
        rest = case["seed_rate"], case["capacity"], case["block"], case["update"], transpose, stochastic
        wanted = reference.quantize_block(x, state, 2, *rest)
        got = [t.cpu() for t in quantize.quantize_block(device, device_state, 2, *rest)]
        slot = wanted[4]
        for name, a, b in zip(("low", "low_t", "high", "high_t", "slot", "scale"), wanted, got, strict=True):
            assert a.shape == b.shape
            if a.dim() == 3:
                a, b = used(a, slot), used(b, slot)
            assert_close(name, a, b, EXACT, check_dtype=True)
        if state is not None:
            assert_close("state", state, device_state, EXACT)

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_transposed_integers(layout):
        x, device = tensor(70, 50, torch.float32, "non-finite", layout)
        row = quantize.quantize_row(device, None, 0, 0.0, 0, 32, False, True)
        block = quantize.quantize_block(device, None, 0, 0.0, 0, 32, False, True, "nothing")
        for low_t, scale in ((row[1], row[5]), (block[1], block[5])):
            assert_close("Triton", low_t, quantize.transposed_integers(device, scale, 32), EXACT, check_dtype=True)
            assert_close("reference", low_t, reference.transposed_integers(x, scale.cpu(), 32), EXACT, check_dtype=True)

    @pytest.mark.parametrize("capacity", [0, 1])
    def test_the_default_block(capacity):
        case = ATTACK | {"rows": 130, "columns": 140, "kind": "outliers", "dtype": torch.bfloat16, "block": 128}
        x, device = tensor(**case)
        s, t, m = torch.rand(130), torch.rand(140), torch.full((130,), 127.0)
        rest = None, 0.25, capacity, 128, False
        for a, b in (
            (
                reference.quantize_row(x, None, 0, *rest[1:], True),
                quantize.quantize_row(device, None, 0, *rest[1:], True),
            ),
            (
                reference.quantize_row_gradient(x, t, s, m, *rest, "all", False),
                quantize_row_gradient(device, t.to(DEVICE), s.to(DEVICE), m.to(DEVICE), *rest, "all", False),
            ),
        ):
            for i, (wanted, got) in enumerate(zip(a, b, strict=True)):
                if wanted.dim() == 3:
                    wanted, got = wanted[:capacity], got[:capacity]
                assert_close(str(i), wanted, got, EXACT, check_dtype=True)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
    def test_rows_longer_than_one_step(dtype):
        x = torch.randn(35, 1100)
        x[1], x[2, 3], x[3, 1099], x[34] = 0.0, float("nan"), float("inf"), x[34] * 1e-6
        x = x.to(dtype)
        wanted = reference.quantize_row(x, None, 0, 0.0, 0, 32, False, False)
        got = quantize.quantize_row(x.to(DEVICE), None, 0, 0.0, 0, 32, False, False)
        for i, (a, b) in enumerate(zip(wanted, got, strict=True)):
            assert_close(str(i), a, b, EXACT, check_dtype=True)

    def test_ties_among_many_blocks(monkeypatch):
        # More blocks than the selection takes in one step, and more that exceed the threshold than have room.
        sizes = quantize.select_sizes
        monkeypatch.setattr(
            quantize, "select_sizes", lambda *a: sizes(*a) | {"CHUNK": 64, "WHOLE": False, "COLUMN_CHUNK": 8}
        )
        x = torch.randint(1, 4, (32 * 11, 32 * 14)).float()
        x[::32, ::32] = torch.arange(154.0).view(11, 14).remainder(11)
        for capacity in (7, 70, 154):
            wanted = reference.quantize_row(x, None, 0, 0.5, capacity, 32, False, True)
            got = quantize.quantize_row(x.to(DEVICE), None, 0, 0.5, capacity, 32, False, True)
            for i in (0, 1, 4, 5, 6):
                assert_close(str(i), wanted[i], got[i], EXACT)

    @pytest.mark.parametrize(("chunk", "whole"), [(2048, True), (128, False)])
    @pytest.mark.parametrize("values", ["float32", "bfloat16", "ties", "zeros", "huge"])
    def test_selection_among_many_blocks(values, chunk, whole):
        """Threshold, capacity, slots and counts as the reference has them, in one step and in several."""
        torch.manual_seed(0)
        amax = torch.randn(3, 201).exp()
        amax = {
            "float32": amax,
            "bfloat16": amax.bfloat16().float(),
            "ties": amax.round(),
            "zeros": torch.zeros_like(amax),
            "huge": amax.clamp(max=3.0) * 1e38,
        }[values]
        amax[0, 3], amax[1, 7], amax[2, 200] = float("nan"), float("inf"), amax.nan_to_num(0.0).max() + 1.0
        rows, columns = 96, 201 * 32
        sizes = quantize.select_sizes(32, amax.numel(), 201) | {"CHUNK": chunk, "WHOLE": whole}
        # Thresholds that are looked for, with room for what exceeds them and without; and given ones.
        for threshold, seed_blocks, capacity in (
            (None, 120, 150),
            (float("nan"), 150, 120),
            (float("nan"), 700, 602),
            (0.01, 0, 1),
            (1.5, 0, 120),
            (0.0, 0, 602),
            (float("inf"), 0, 1),
        ):
            state = None if threshold is None else torch.tensor([[threshold, 3.0, 9.0, 0.25]])
            device_state = None if state is None else state[0].to(DEVICE)
            slot = torch.zeros(3, 201, dtype=torch.int32, device=DEVICE)
            scale = torch.zeros(3, 201, device=DEVICE)
            matrix_select[(3, 1)](
                amax.view(torch.int32).to(DEVICE), device_state, seed_blocks, capacity, 1, slot, None, scale, None,
                None, 0.0, None, None, rows, columns, FALLBACK=True, **sizes,
            )  # fmt: skip
            mask = reference.fallback_mask(amax, state, 0, seed_blocks / 603, capacity, True)
            assert_close("slot", reference.slots(mask), slot, EXACT)
            if state is not None:
                assert_close("state", state[0], device_state, EXACT)

    def test_results_repeat():
        _, device = tensor(70, 90, torch.float32, "outliers", "contiguous")
        first, second = (quantize.quantize_block(device, None, 0, 0.5, 9, 32, False, True, "all") for _ in range(2))
        for i in (0, 1, 4, 5):
            assert torch.equal(first[i], second[i])

    def test_empty():
        for rows, columns in ((0, 40), (40, 0)):
            x = torch.empty(rows, columns, device=DEVICE)
            low, low_t, _, _, slot, scale, int_max = quantize.quantize_row(x, None, 0, 0.2, 0, 32, True, True)
            assert low.shape == (rows, blocks_along(columns, 32) * 32)
            assert low_t.shape == (columns, blocks_along(rows, 32) * 32)
            assert slot.numel() == 0
            assert (scale == MIN_SCALE).all()
            assert (int_max == 0).all()
            s, t = torch.ones(rows, device=DEVICE), torch.ones(columns, device=DEVICE)
            out = quantize_row_gradient(x, t, s, s, None, 0.2, 1, 32, True, "nothing", True)
            assert_close("dbias", torch.zeros(columns), out[8], EXACT)
            assert quantize.quantize_block(x, None, 0, 0.2, 0, 32, True, True, "nothing")[5].numel() == 0

    def test_what_it_cannot_take_is_said():
        x = torch.zeros(4, 4, device=DEVICE)
        with pytest.raises(ValueError, match=r"block=48 .* 32, 64, 128.*reference"):
            quantize.quantize_row(x, None, 0, 0.2, 0, 48, True, True)
        with pytest.raises(ValueError, match=r"bfloat16.*not int32 of shape \(4, 4\)"):
            quantize.quantize_row(x.int(), None, 0, 0.2, 0, 32, True, True)
