"""An op's launches, noted at one call and repeated at the next ones with arguments of the same kind.

Which kernels an op launches, with which grids, numbers and memory, follows from its arguments' shapes, strides, dtypes,
alignment and device, and from its other arguments; only addresses change. What finds all that out is Python and takes a
linear layer longer than a GPU needs for it, so it is done once: a call is watched, what it allocates and launches
becomes a `_Program`, and later calls allocate, fill in the addresses and launch.

A call is only repeated if nothing but allocations, views and launches was seen in it, and every address that it
launched with lies in one of its arguments or in what it allocated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_int8.kernels import launch

_ALLOCATIONS = (torch.ops.aten.empty, torch.ops.aten.empty_strided, torch.ops.aten.empty_like, torch.ops.aten.new_empty)
# Of addresses within the memory that an op's intermediate tensors share: at least what PyTorch's own allocations have.
_ALIGNMENT = 512
# Token counts may vary from call to call; past so many kinds of arguments all are forgotten.
_MAX_KINDS = 1024
# Stand for the program of a kind that never came, or once.
_NEVER_SEEN, _SEEN = "never seen", "seen"
# What Inductor's programs allocate with, too: on the current device, past the dispatcher.
_EMPTY = {"cuda": torch._C._dynamo.guards._empty_strided_cuda, "cpu": torch._C._dynamo.guards._empty_strided_cpu}


def repeated(backend: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` of ``backend``, repeated from what it launched before if it launches anything."""
    return function if backend == "reference" else Replayed(function)


class Replayed:
    """``function(*args)``, which allocates and launches, with less host time from its third call of a kind on.

    Args:
        function: Takes tensors, lists of tensors, ``None`` and hashable values; returns tensors. What it does may
            depend on the tensors' contents on the device only, and on nothing that changes beside its arguments.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self._programs: dict[tuple[Any, ...], Any] = {}
        from triton import knobs  # what launches needs it, the reference does not

        self._runtime = knobs.runtime

    def _is_hooked(self) -> bool:
        """Whether a profiler wants to be told of launches, as Triton's own does."""
        return bool(self._runtime.launch_enter_hook.calls or self._runtime.launch_exit_hook.calls)

    def __call__(self, *args: Any) -> Any:
        if launch.is_noting() or self._is_hooked():
            return self.function(*args)
        addresses: list[int] = []
        kinds: list[Any] = []
        for arg in args:
            if isinstance(arg, Tensor):
                addresses.append(address := arg.data_ptr())
                kinds.append((arg.dtype, arg.get_device(), arg.shape, arg.stride(), address % 16))
            elif type(arg) is list:
                kinds.append(len(arg))
                for part in arg:
                    addresses.append(address := part.data_ptr())
                    kinds.append((part.dtype, part.get_device(), part.shape, part.stride(), address % 16))
            else:
                kinds.append(arg)
        key = tuple(kinds)
        program = self._programs.get(key, _NEVER_SEEN)
        if isinstance(program, FunctionType):
            return program(*addresses)
        if program is _NEVER_SEEN:
            # This call compiles what has to be. A kind that comes once is not worth watching.
            if len(self._programs) >= _MAX_KINDS:
                self._programs.clear()
            self._programs[key] = _SEEN
        elif program is _SEEN:
            watch = _Watch([tensor for arg in args for tensor in _tensors(arg)])
            with watch, launch.watching(watch.launched):
                result = self.function(*args)
            self._programs[key] = watch.program(result)
            return result
        return self.function(*args)


def _tensors(arg: Any) -> Sequence[Tensor]:
    return [arg] if isinstance(arg, Tensor) else arg if type(arg) is list else ()


class _Launch(NamedTuple):
    """A launch, without the addresses.

    Attributes:
        compiled: The kernel.
        grid: In three dimensions.
        arguments: All that follows the grid and the stream.
        addresses: Which of ``arguments`` are addresses: index, number of the tensor, bytes from its start.
        descriptors: Which are tensor descriptors: the same, and what else a descriptor has.
    """

    compiled: Any
    grid: tuple[int, int, int]
    arguments: list[Any]
    addresses: list[tuple[int, int, int]]
    descriptors: list[tuple[int, int, int, tuple[Any, ...]]]


class _Program(NamedTuple):
    """What a call allocates, launches and returns.

    Attributes:
        device: Of all its tensors.
        arguments: How many tensors it takes.
        made: Size, strides and dtype of each tensor that it returns.
        workspace: Bytes of what is allocated besides.
        launches: In their order. Tensors are numbered: the arguments, ``made``, the workspace.
        single: Whether it returns one tensor, not in a tuple.
    """

    device: torch.device
    arguments: int
    made: list[tuple[tuple[int, ...], tuple[int, ...], torch.dtype]]
    workspace: int
    launches: list[_Launch]
    single: bool

    def written(self) -> FunctionType:
        """A function that does it, of the arguments' addresses: straight code, which Python runs twice as fast."""
        made = [*self.made, ((self.workspace,), (1,), torch.uint8)] if self.workspace else self.made
        takes = ", ".join(f"p{i}" for i in range(self.arguments))
        lines, names = [f"def repeated({takes}):"], {"empty": _EMPTY[self.device.type], "Descriptor": _Descriptor}

        def named(value: Any) -> str:
            if value is None or type(value) in (bool, int):
                return repr(value)
            name = f"c{len(names)}"
            names[name] = value
            return name

        if self.device.type == "cuda":
            names |= {"current": torch.cuda.current_device, "switched": torch.cuda.device}
            lines += [
                f"    if current() != {self.device.index}:",
                f"        with switched({self.device.index}):",
                f"            return repeated({takes})",
                f"    stream = {named(torch._C._cuda_getCurrentRawStream)}({self.device.index})",
            ]
        else:
            lines.append("    stream = 0")
        for i, (size, strides, dtype) in enumerate(made):
            lines.append(f"    t{i} = empty({named(size)}, {named(strides)}, {named(dtype)})")
            lines.append(f"    p{self.arguments + i} = t{i}.data_ptr()")
        for compiled, grid, arguments, addresses, descriptors in self.launches:
            texts = [named(value) for value in arguments]
            for at, tensor, offset in addresses:
                texts[at] = f"p{tensor} + {offset}" if offset else f"p{tensor}"
            for at, tensor, offset, rest in descriptors:
                texts[at] = f"Descriptor(p{tensor} + {offset}, {', '.join(map(named, rest))})"
            lines.append(f"    {named(compiled.run)}({', '.join(map(str, grid))}, stream, {', '.join(texts)})")
        returned = ", ".join(f"t{i}" for i in range(len(self.made)))
        if not self.single:
            returned = f"({returned},)" if returned else "()"
        lines.append(f"    return {returned}")
        exec("\n".join(lines), names)
        return names["repeated"]


class _Descriptor:
    """What Triton's launcher reads of a tensor descriptor, whose contents were checked when the launch was noted."""

    __slots__ = ("address", "padding", "round_f32_to_tf32", "shape", "strides")

    def __init__(self, address: int, shape: Sequence[int], strides: Sequence[int], padding: str, tf32: bool) -> None:
        self.address, self.shape, self.strides, self.padding = address, shape, strides, padding
        self.round_f32_to_tf32 = tf32

    @property
    def base(self) -> _Descriptor:
        return self

    def data_ptr(self) -> int:
        return self.address


class _Watch(TorchDispatchMode):
    """Notes what a call does while entered.

    Attributes:
        made: What it has allocated.
        launches: What it has launched, with tensors numbered as they were found: the arguments, then ``made``.
        whole: Whether that is all it did, and all addresses are known.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self.known = tensors
        self.made: list[Tensor] = []
        self.launches: list[_Launch] = []
        self.whole = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in _ALLOCATIONS:
            self.made.append(out)
        elif not func.is_view:
            self.whole = False
        return out

    def launched(self, compiled: Any, grid: tuple[int, int, int], arguments: list[Any]) -> None:
        """Notes a launch; ``compiled`` is ``None`` where nothing was compiled."""
        if compiled is None:
            self.whole = False
            return
        # No hooks: see `Replayed`.
        arguments = [compiled.function, compiled.packed_metadata, None, None, None, *arguments]
        addresses, descriptors = [], []
        for at, value in enumerate(arguments):
            # No tensor is kept: its memory would be too.
            if isinstance(value, Tensor):
                arguments[at] = 0  # of an empty one
                if value.numel() > 0:
                    addresses.append((at, *self._place(value)))
            elif hasattr(value, "block_shape"):
                arguments[at] = None
                tf32 = getattr(value, "round_f32_to_tf32", False)
                rest = tuple(value.shape), tuple(value.strides), value.padding, tf32
                descriptors.append((at, *self._place(value.base), rest))
        self.launches.append(_Launch(compiled, grid, arguments, addresses, descriptors))

    def _place(self, tensor: Tensor) -> tuple[int, int]:
        """The number of the tensor in which ``tensor`` begins, and how many bytes in."""
        address = tensor.data_ptr()
        found = [
            (number, address - known.data_ptr())
            for number, known in enumerate(self.known + self.made)
            if 0 <= address - known.data_ptr() < _extent(known)
        ]
        # Two arguments may share memory in this call and not in the next one.
        self.whole &= len(found) == 1
        return found[0] if found else (0, 0)

    def program(self, result: Tensor | Sequence[Tensor]) -> FunctionType | None:
        """How to repeat the call that returned ``result``; ``None`` if it cannot be."""
        results = [result] if isinstance(result, Tensor) else list(result)
        devices = {tensor.device for tensor in (*self.known, *self.made)}
        # By address, since what the call holds of an allocation may be another tensor object. Empty ones have none.
        returned = {tensor.data_ptr(): number for number, tensor in enumerate(results) if tensor.numel() > 0}
        sizes = {tensor.data_ptr(): _extent(tensor) for tensor in self.made if tensor.numel() > 0}
        own = all(t.numel() == 0 or _extent(t) == sizes.get(t.data_ptr()) for t in results)
        if not self.whole or not own or len(devices) != 1 or len(returned) < sum(t.numel() > 0 for t in results):
            return None
        workspace, places = 0, [(number, 0) for number in range(len(self.known))]
        for tensor in self.made:
            if tensor.data_ptr() in returned:
                places.append((len(self.known) + returned[tensor.data_ptr()], 0))
            else:
                places.append((len(self.known) + len(results), workspace))
                workspace += -(-_extent(tensor) // _ALIGNMENT) * _ALIGNMENT

        def moved(at: int, number: int, offset: int, *rest: Any) -> Any:
            return at, places[number][0], places[number][1] + offset, *rest

        return _Program(
            device=devices.pop(),
            arguments=len(self.known),
            made=[(tuple(tensor.shape), tensor.stride(), tensor.dtype) for tensor in results],
            workspace=workspace,
            launches=[
                noted._replace(
                    addresses=[moved(*place) for place in noted.addresses],
                    descriptors=[moved(*place) for place in noted.descriptors],
                )
                for noted in self.launches
            ],
            single=isinstance(result, Tensor),
        ).written()


def _extent(tensor: Tensor) -> int:
    """From the first byte of ``tensor`` to past its last."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()
