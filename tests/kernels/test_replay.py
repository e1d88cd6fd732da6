"""Repeated launches give what the first call gave, for other tensors; what cannot be repeated is called again."""

from __future__ import annotations

import ctypes
import weakref
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_int8.kernels import replay
from lightning_int8.kernels.launch import CachedLaunch, noting_launches
from lightning_int8.kernels.replay import Replayed

pytest.importorskip("triton")


class Scale:
    """A kernel for CPU addresses, ``out[:n] = x[:n] * factor``, that also stands for what it compiles to."""

    __name__, arg_names, constexprs = "scale", ("x", "out", "n", "factor"), (3,)
    function, packed_metadata = 7, (4, 1, 0)

    def __init__(self) -> None:
        self.bound: list[tuple[int, ...]] = []
        self.repeated: list[tuple[int, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launched(x: Tensor | int, out: Tensor | int, n: int, factor: float) -> Scale:
            self.bound.append(grid)
            _scale(_address(x), _address(out), n, factor)
            return self

        return launched

    def run(self, x, y, z, stream, function, packed, metadata, enter, leave, *arguments) -> None:
        """What Triton's launcher is called with."""
        assert (stream, function, packed, metadata, enter, leave) == (0, 7, (4, 1, 0), None, None, None)
        self.repeated.append((x, y, z))
        _scale(*arguments)


def _address(value: Tensor | int) -> int:
    return value.data_ptr() if isinstance(value, Tensor) else value


def _scale(x: int, out: int, n: int, factor: float) -> None:
    read, write = ((ctypes.c_float * n).from_address(at) if n else () for at in (x, out))
    for i in range(n):
        write[i] = read[i] * factor


@pytest.fixture
def kernel() -> Scale:
    return Scale()


@pytest.fixture
def doubled_thrice(kernel) -> Replayed:
    """``8·x`` by way of two intermediate tensors, and ``4·x[row]``."""
    launch = CachedLaunch(kernel)

    def function(x: Tensor, row: int) -> tuple[Tensor, Tensor]:
        (a, b), c = (torch.empty(x.numel()) for _ in range(2)), torch.empty_like(x)
        picked = torch.empty(x.shape[1])
        launch[(3,)](x, a, x.numel(), factor=2.0)
        launch[(3, 2)](a, b, x.numel(), factor=2.0)
        launch[(1,)](b, c, x.numel(), factor=2.0)
        launch[(1,)](x[row], picked, x.shape[1], factor=4.0)
        return c, picked

    return Replayed(function)


def test_later_calls_repeat_the_launches_on_other_tensors(kernel, doubled_thrice):
    kept = []
    for call in range(5):
        x = torch.randn(4, 5)
        whole, picked = doubled_thrice(x, 2)
        kept.append((whole, picked, x * 8, x[2] * 4))
        assert len(kernel.bound) == 4 * min(call + 1, 2)
    assert kernel.repeated == [(3, 1, 1), (3, 2, 1), (1, 1, 1), (1, 1, 1)] * 3
    for whole, picked, expected, expected_row in kept:  # none has written over another's
        assert torch.equal(whole, expected)
        assert torch.equal(picked, expected_row)


@pytest.mark.parametrize(
    ("x", "row"),
    [
        (torch.randn(5, 4), 2),
        (torch.randn(4, 5), 3),
        (torch.randn(21)[1:].view(4, 5), 2),  # alignment
    ],
)
def test_another_kind_of_argument_is_not_repeated_from_this_one(kernel, doubled_thrice, x, row):
    for _ in range(3):
        doubled_thrice(torch.randn(4, 5), 2)
    assert len(kernel.repeated) == 4
    whole, picked = doubled_thrice(x, row)
    assert len(kernel.repeated) == 4
    assert torch.equal(whole, x * 8)
    assert torch.equal(picked, x[row] * 4)


def test_a_call_that_computes_in_pytorch_is_never_repeated(kernel):
    launch = CachedLaunch(kernel)

    def function(x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        launch[(1,)](x.clone(), out, x.numel(), factor=2.0)
        return out

    repeated = Replayed(function)
    for _ in range(4):
        x = torch.randn(3)
        assert torch.equal(repeated(x), 2 * x)
    assert not kernel.repeated


def test_nor_one_with_an_address_of_unknown_or_doubtful_origin(kernel):
    launch = CachedLaunch(kernel)
    constant = torch.ones(3)

    def function(x: Tensor, y: Tensor) -> Tensor:
        out = torch.empty_like(x)
        launch[(1,)](y, out, x.numel(), factor=2.0)
        return out

    def with_constant(x: Tensor) -> Tensor:
        return function(x, constant)

    x, repeated, other = torch.randn(3), Replayed(function), Replayed(with_constant)
    for _ in range(4):
        repeated(x, x)
        other(x)
    assert not kernel.repeated
    # Seen with both arguments in one tensor, called with two: the second is the one that is read.
    y = torch.randn(3)
    assert torch.equal(repeated(x, y), 2 * y)


def test_nor_one_that_returns_its_argument(kernel):
    repeated = Replayed(lambda x: x)
    x = torch.randn(3)
    assert all(repeated(x) is x for _ in range(4))


def test_no_tensor_is_kept(kernel, doubled_thrice):
    # CUDA graphs of PyTorch's count every tensor that lives in their memory.
    alive = []
    for _ in range(4):
        x = torch.randn(4, 5)
        alive += [weakref.ref(x), *map(weakref.ref, doubled_thrice(x, 2))]
    del x
    assert len(kernel.repeated) == 2 * 4
    assert not [tensor for tensor in alive if tensor() is not None]


def test_empty_tensors_and_sequences(kernel):
    launch = CachedLaunch(kernel)

    def function(xs: list[Tensor]) -> tuple[Tensor, ...]:
        out, nothing = torch.empty(3), torch.empty(0, 4, dtype=torch.int8)
        launch[(1,)](nothing, nothing, 0, factor=2.0)
        launch[(1,)](xs[-1], out, 3, factor=2.0)
        return nothing, out, torch.empty(0)

    repeated = Replayed(function)
    for count in (1, 2):
        for _ in range(4):
            xs = [torch.randn(3) for _ in range(count)]
            nothing, out, also_nothing = repeated(xs)
            assert nothing.shape == (0, 4)
            assert nothing.dtype == torch.int8
            assert also_nothing.shape == (0,)
            assert torch.equal(out, 2 * xs[-1])
    assert len(kernel.repeated) == 2 * 2 * 2


def test_a_function_may_write_into_its_argument_alone(kernel):
    launch = CachedLaunch(kernel)

    def function(x: Tensor, out: Tensor) -> tuple[Tensor, ...]:
        launch[(1,)](x, out, 3, factor=2.0)
        return ()

    repeated = Replayed(function)
    for _ in range(4):
        x, out = torch.randn(3), torch.empty(3)
        assert repeated(x, out) == ()
        assert torch.equal(out, 2 * x)
    assert len(kernel.repeated) == 2


def test_launches_are_noted_and_profiled_as_without_it(kernel, doubled_thrice):
    from triton import knobs

    for _ in range(3):
        doubled_thrice(torch.randn(4, 5), 2)
    noted, hook = [], lambda metadata: None
    with noting_launches(lambda *launch: noted.append(launch)):
        doubled_thrice(torch.randn(4, 5), 2)
    assert len(noted) == 4
    knobs.runtime.launch_enter_hook.add(hook)
    try:
        doubled_thrice(torch.randn(4, 5), 2)
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    assert len(kernel.bound) == 3 * 4
    assert len(kernel.repeated) == 4


def test_launches_go_to_the_device_of_the_tensors_and_its_stream(monkeypatch):
    current, streams = [0], []

    @contextmanager
    def switched(index):
        before, current[0] = current[0], index
        yield
        current[0] = before

    class Compiled:
        def run(self, x, y, z, stream, *arguments):
            streams.append((current[0], stream, *arguments))

    def empty(size, strides, dtype):
        assert current[0] == 1  # allocations go to the current device, too
        return torch.empty_strided(size, strides, dtype=dtype)

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", switched)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 100 + index, raising=False)
    monkeypatch.setitem(replay._EMPTY, "cuda", empty)
    launches = [replay._Launch(Compiled(), (1, 1, 1), [None, 5], [(0, 0, 12)], [])]
    made = [((3,), (1,), torch.float32)]
    run = replay._Program(torch.device("cuda", 1), 1, made, 64, launches, single=True).written()
    for before in (0, 1):
        current[0] = before
        assert run(1000).shape == (3,)
        assert current[0] == before
    assert streams == [(1, 101, 1012, 5)] * 2


def test_a_failed_call_is_not_repeated(kernel):
    launch, fail = CachedLaunch(kernel), [False]

    def function(x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        if fail[0]:
            raise RuntimeError("out of memory")
        launch[(1,)](x, out, x.numel(), factor=2.0)
        return out

    repeated, x = Replayed(function), torch.randn(3)
    repeated(x)
    fail[0] = True
    with pytest.raises(RuntimeError, match="out of memory"):
        repeated(x)
    fail[0] = False
    for _ in range(3):
        assert torch.equal(repeated(x), 2 * x)


def test_kinds_are_forgotten_past_a_limit(kernel, monkeypatch, doubled_thrice):
    monkeypatch.setattr(replay, "_MAX_KINDS", 3)
    for rows in (3, 4, 5, 6) * 2:
        x = torch.randn(rows, 5)
        assert torch.equal(doubled_thrice(x, 0)[0], 8 * x)
    assert len(doubled_thrice._programs) <= 3
