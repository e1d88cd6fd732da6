"""The ops' launches, repeated, against the same functions called plainly: every bit of every result and state.

Without a GPU the kernels run in Triton's interpreter, in a process of its own (see `interpreter`), with addresses made
into tensors again.
"""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from tests.kernels.interpreter import interpreting, run_interpreted

INTERPRETED = interpreting(__file__)

if not INTERPRETED and not torch.cuda.is_available():

    def test_in_the_interpreter():
        run_interpreted(__file__)

else:
    from lightning_int8.kernels import backends, hadamard_ops, launch, ops, power, swiglu_ops
    from lightning_int8.kernels.replay import Replayed

    DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
    NATIVE = ["triton"] if INTERPRETED or torch.cuda.get_device_capability() != (9, 0) else ["triton", "hopper"]
    BLOCK = 32 if INTERPRETED else 128
    ROWS, COLUMNS, FEATURES = BLOCK + 5, BLOCK + 16, BLOCK
    CACHES = [module._implementation for module in (ops, swiglu_ops, power, hadamard_ops)] + [ops._product]

    class Interpreted:
        """A kernel of the interpreter, and what stands for it compiled: launched with addresses."""

        function, packed_metadata = 0, (4, 1, 0)

        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel
            self.arg_names, self.constexprs, self.__name__ = kernel.arg_names, (), kernel.__name__

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def launched(*args: Any, **constants: Any) -> Any:
                # The interpreter computes in PyTorch, too.
                with _disable_current_modes():
                    self.kernel[grid](*args, **constants)
                return _Again(self.kernel, args, constants)

            return launched

    class _Again(Interpreted):
        """For arguments of one kind."""

        def __init__(self, kernel: Any, args: tuple[Any, ...], constants: dict[str, Any]) -> None:
            super().__init__(kernel)
            self.dtypes = [arg.dtype if isinstance(arg, Tensor) else None for arg in args]
            self.constants = constants

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def launched(*args: Any) -> None:
                with _disable_current_modes():
                    self.kernel[grid](*args[: len(self.dtypes)], **self.constants)

            return launched

        def run(self, x: int, y: int, z: int, stream: int, *args: Any) -> None:
            """What Triton's launcher is called with."""
            args = args[5 : 5 + len(self.dtypes)]
            self[x, y, z](*(a if d is None else _at(a, d) for a, d in zip(args, self.dtypes, strict=True)))

    def _at(address: int, dtype: torch.dtype) -> Tensor:
        if address == 0:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer((ctypes.c_char * 8).from_address(address), dtype=dtype)

    @pytest.fixture(autouse=True)
    def interpreted_addresses(monkeypatch):
        """Kernels that are interpreted can be launched with addresses; every test begins without programs."""
        for cached in CACHES:
            cached.cache_clear()
        if INTERPRETED:
            first = launch.CachedLaunch._launch

            def prepared(self, grid, *args, **constants):
                if not isinstance(self.kernel, Interpreted):
                    monkeypatch.setattr(self, "kernel", Interpreted(self.kernel))
                return first(self, grid, *args, **constants)

            monkeypatch.setattr(launch.CachedLaunch, "_launch", prepared)
        yield
        for cached in CACHES:
            cached.cache_clear()

    def equal(repeated: Replayed, arguments: Any, undefined: tuple[int, ...] = (), written: int | None = None) -> None:
        """The third and the fourth call, which are repeated, against the plain function on values of their own.

        ``undefined``: results past whose number of fallback blocks nothing is written; ``written``: an argument that
        the call changes.
        """
        assert isinstance(repeated, Replayed)
        kept = []
        for call in range(4):
            mine = arguments(call)
            results = repeated(*mine)
            if call < 2:
                continue
            others = arguments(call)
            found, expected = ([r] if isinstance(r, Tensor) else list(r) for r in (results, repeated.function(*others)))
            if written is not None:
                found.append(mine[written])
                expected.append(others[written])
            kept.append((found, expected))
        (program,) = repeated._programs.values()
        assert callable(program)  # it was watched, and can be repeated
        assert not all(torch.equal(a, b) for a, b in zip(kept[0][1], kept[1][1], strict=True))  # values do differ
        for found, expected in kept:  # at the end: no call has written over what another one returned
            for i, (a, b) in enumerate(zip(found, expected, strict=True)):
                assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
                if i not in undefined:
                    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)

    def matrix(seed: int, rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn(rows, columns, generator=generator)
        return (values * torch.randn(rows, 1, generator=generator).exp()).to(DEVICE, dtype)

    def thresholds() -> Tensor:
        state = torch.zeros(3, 5)
        state[:, 0] = 2.0
        return state.to(DEVICE)

    @pytest.mark.parametrize("backend", NATIVE)
    @pytest.mark.parametrize("capacity", [0, 3])
    def test_quantize_row(backend, capacity):
        def arguments(seed):
            return matrix(seed, ROWS, COLUMNS), thresholds(), 0, 0.2, capacity, BLOCK, True, capacity > 0

        equal(ops._implementation(backend, "quantize_row"), arguments, undefined=(2, 3), written=1)

    @pytest.mark.parametrize("backend", NATIVE)
    def test_quantize_row_from_a_transposed_slice(backend):
        def arguments(seed):
            return matrix(seed, COLUMNS, ROWS + 16)[:, 16:].t(), None, 0, 0.2, 3, BLOCK, False, True

        equal(ops._implementation(backend, "quantize_row"), arguments, undefined=(2, 3))

    @pytest.mark.parametrize("backend", NATIVE)
    def test_quantize_block(backend):
        def arguments(seed):
            return matrix(seed, ROWS, COLUMNS), thresholds(), 1, 0.2, 3, BLOCK, True, True, "small"

        equal(ops._implementation(backend, "quantize_block"), arguments, undefined=(2, 3), written=1)

    @pytest.mark.parametrize("backend", NATIVE)
    def test_transposed_integers(backend):
        def arguments(seed):
            weight = matrix(seed, FEATURES, COLUMNS, torch.float32)
            return weight, weight.abs().amax(1) / 127, BLOCK

        equal(ops._implementation(backend, "transposed_integers"), arguments)

    @pytest.mark.parametrize("backend", NATIVE)
    @pytest.mark.parametrize(("stochastic", "bias", "group_blocks"), [("nothing", True, 0), ("small", False, 1)])
    def test_quantize_row_gradient(backend, stochastic, bias, group_blocks):
        def arguments(seed):
            x, t = matrix(seed, ROWS, 1, torch.float32).abs().flatten(), matrix(seed, FEATURES, 1, torch.float32)
            return (
                matrix(seed, ROWS, FEATURES), t.abs().flatten(), x, x * 0 + 127, thresholds(), 0.2, 3, BLOCK, True,
                stochastic, bias, [], group_blocks,
            )  # fmt: skip

        equal(ops._implementation(backend, "quantize_row_gradient"), arguments, undefined=(1, 5), written=4)

    def operand(backend: str, scheme: str, seed: int, rows: int, columns: int, capacity: int) -> tuple[Tensor, ...]:
        quantize = getattr(backends.load(backend), f"quantize_{scheme}")
        x, extra = matrix(seed, rows, columns), () if scheme == "row" else (False,)
        low, _, high, _, slot, scale, *_ = quantize(x, None, 0, 0.2, capacity, BLOCK, False, False, *extra)
        return low, high, slot, scale

    @pytest.mark.parametrize("backend", NATIVE)
    @pytest.mark.parametrize(("scheme", "bias"), [("row", True), ("block", False)])
    def test_products(backend, scheme, bias):
        def arguments(seed):
            return (
                *operand(backend, scheme, seed, ROWS, COLUMNS, 3),
                *operand(backend, scheme, seed, FEATURES, COLUMNS, 2),
                matrix(seed, 1, FEATURES)[0] if bias else None, COLUMNS, BLOCK, torch.bfloat16, 0,
            )  # fmt: skip

        equal(ops._product(backend, f"gemm_{scheme}", False), arguments)

    @pytest.mark.parametrize("backend", NATIVE)
    def test_a_long_contraction(backend):
        # On Hopper it is cut into parts.
        def arguments(seed):
            depth = (4 if INTERPRETED else 16) * BLOCK
            a, b = (operand(backend, "row", seed, rows, depth, 4) for rows in (BLOCK, BLOCK))
            return *a, *b[:3], None, None, depth, BLOCK, torch.float32, 0

        equal(ops._product(backend, "gemm_row", False), arguments)

    @pytest.mark.parametrize("backend", NATIVE)
    def test_swiglu(backend):
        def forward(seed):
            gate, up = matrix(seed, ROWS, COLUMNS), matrix(seed + 9, ROWS, COLUMNS)
            return gate, up, thresholds(), 0, 0.2, 3, BLOCK, True, True

        def gradient(seed):
            gate, up = matrix(seed, ROWS, COLUMNS), matrix(seed + 9, ROWS, COLUMNS)
            scales = [matrix(seed + n, n, 1, torch.float32).abs().flatten() for n in (COLUMNS, COLUMNS, ROWS, ROWS)]
            return matrix(seed + 5, ROWS, COLUMNS), gate, up, *scales, 3, BLOCK, False

        def planes(seed):
            gate, up, *rest = forward(seed)
            *_, slot, scale, _ = swiglu_ops._implementation(backend, "swiglu_row").function(gate, up, *rest)
            return gate, up, scale, slot, 3, BLOCK

        equal(swiglu_ops._implementation(backend, "swiglu_row"), forward, undefined=(3, 4), written=2)
        equal(swiglu_ops._implementation(backend, "swiglu_gradient"), gradient, written=0)
        equal(swiglu_ops._implementation(backend, "swiglu_planes"), planes, undefined=(1,))

    @pytest.mark.parametrize("backend", NATIVE)
    def test_power(backend):
        def of_input(seed):
            return matrix(seed, ROWS, COLUMNS), matrix(seed, ROWS, 1, torch.float32), torch.ones(3, 16).to(DEVICE), 0

        def of_gradient(seed):
            s, t = matrix(seed, ROWS, 1, torch.float32).flatten(), matrix(seed, COLUMNS, 1, torch.float32).flatten()
            return matrix(seed, ROWS, COLUMNS), t, s, s * 2, t * 2, torch.ones(3, 16).to(DEVICE)

        equal(power._implementation(backend, "measure_power"), of_input, undefined=(0,), written=2)
        equal(power._implementation(backend, "measure_gradient_power"), of_gradient, written=5)

    @pytest.mark.parametrize("backend", NATIVE)
    @pytest.mark.parametrize("activation", [False, True])
    def test_hadamard(backend, activation):
        def arguments(seed):
            # More tokens than are mixed at a time.
            x, up = (matrix(s, 128 + ROWS, COLUMNS, torch.float16) for s in (seed, seed + 9))
            return (x, up, BLOCK, False) if activation else (x.t().contiguous().t(), None, BLOCK, True)

        equal(hadamard_ops._implementation(backend, "quantize_hadamard"), arguments)

    @pytest.mark.parametrize("backend", NATIVE)
    # Both in two reads, with and without fallback; rows alone, in two reads and in one; mixed first.
    @pytest.mark.parametrize(
        ("block", "capacity", "columns"),
        [(128, 3, True), (128, 0, True), (128, 3, False), (128, 0, False), (32, 3, True)],
    )
    def test_mixed(backend, block, capacity, columns):
        def arguments(seed):
            x = matrix(seed, 5, COLUMNS)
            if capacity > 0:
                x = x.t().contiguous().t()
            return x, thresholds(), 0, 0.2, capacity, block, True, columns, columns and block == 128

        equal(hadamard_ops._implementation(backend, "quantize_mixed"), arguments, undefined=(1,), written=1)

    @pytest.mark.parametrize("backend", NATIVE)
    def test_activation(backend):
        def arguments(seed):
            return matrix(seed, 5, COLUMNS), matrix(seed + 9, 5, COLUMNS)

        equal(swiglu_ops._implementation(backend, "swiglu"), arguments)
