"""Launching a compiled Triton kernel again without binding and specializing its arguments again.

Triton's own launch takes some 40 microseconds of host time, and a linear layer makes a dozen of them: without this,
small models wait for the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from threading import local
from typing import Any

from torch import Tensor

# What takes a launch (the kernel, its arguments, its constants) in its place; see `noting_launches`.
_note: Callable[[CachedLaunch, tuple[Any, ...], dict[str, Any]], None] | None = None


class _Watcher(local):
    """Who is told of this thread's launches; see `watching`."""

    tell: Callable[[Any, tuple[int, int, int], list[Any]], None] | None = None


_watcher = _Watcher()


class CachedLaunch:
    """A Triton or Gluon kernel, ``kernel[grid](*args, **constants)``, that keeps what it compiled.

    What Triton compiles depends on the arguments' types, whether pointers are aligned to 16 bytes, whether integers are
    1 or divisible by 16, the constants, and the device: the key has all of that. Everything else is the kernel's own
    (attributes, the interpreter, the first launch).

    Args:
        kernel: What ``triton.jit`` or ``gluon.jit`` returned.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.kernel, name)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        return partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *args: Any, **constants: Any) -> Any:
        if _note is not None:
            return _note(self, args, constants)
        key = (*map(kind, args), *constants.items())
        known = self._compiled.get(key)
        x, y, z = (*grid, 1, 1)[:3]
        if known is not None:
            compiled, rest = known
            compiled[x, y, z](*args, *rest)
        else:
            compiled, rest = self.kernel[grid](*args, **constants), ()
            if compiled is not None:  # the interpreter compiles nothing
                names = self.kernel.arg_names[len(args) :]
                if any(index < len(args) for index in self.kernel.constexprs):
                    raise TypeError(f"{self.kernel.__name__}: constants must be passed by name")
                rest = tuple(constants[name] for name in names)
                self._compiled[key] = compiled, rest
        if _watcher.tell is not None:
            _watcher.tell(compiled, (x, y, z), [*args, *rest])
        return compiled


@contextmanager
def noting_launches(note: Callable[[CachedLaunch, tuple[Any, ...], dict[str, Any]], None]) -> Iterator[None]:
    """While entered, ``note`` is called in place of every launch; what the kernels would write stays undefined."""
    global _note
    before, _note = _note, note
    try:
        yield
    finally:
        _note = before


def is_noting() -> bool:
    """Whether launches are noted instead of made."""
    return _note is not None


@contextmanager
def watching(tell: Callable[[Any, tuple[int, int, int], list[Any]], None]) -> Iterator[None]:
    """While entered, ``tell`` is called after every launch of this thread.

    Args:
        tell: Takes the compiled kernel (``None``: it was interpreted), the grid, and the arguments for it.
    """
    _watcher.tell = tell
    try:
        yield
    finally:
        _watcher.tell = None


def kind(value: Any) -> Any:
    """What of an argument the compiled kernel depends on."""
    if isinstance(value, Tensor):
        return value.dtype, value.get_device(), value.data_ptr() % 16 == 0
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        # Triton picks the narrowest of int32, int64 and uint64 that holds the value.
        return value == 1, value % 16 == 0, -(2**31) <= value < 2**31, value < 2**63
    if isinstance(value, float):
        return float
    if hasattr(value, "block_shape"):  # a tensor descriptor
        return value.base.dtype, value.base.get_device(), tuple(value.block_shape), value.layout, value.padding
    return value
