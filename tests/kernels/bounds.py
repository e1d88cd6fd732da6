"""Finds reads and writes outside a kernel's arguments, in Triton's interpreter.

The interpreter reads raw addresses, so an access past the end of a tensor mostly goes unnoticed on a CPU, and is an
illegal memory access on a GPU.
"""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import torch
from triton.runtime import interpreter


@contextmanager
def checked_accesses():
    """While entered, interpreted kernels raise `IndexError` at an access outside the memory of their arguments."""
    inner, call = interpreter._interpreter, interpreter.GridExecutor.__call__
    ranges: list[tuple[int, int]] = []

    class Checked:
        def load(self, pointers, mask, other, dtype):
            check(pointers[mask.astype(bool)], dtype.itemsize, "reads")
            return inner.load(pointers, mask, other, dtype)

        def store(self, pointers, values, mask):
            check(pointers[mask.astype(bool)], values.dtype.itemsize, "writes")
            return inner.store(pointers, values, mask)

        def __getattr__(self, name):
            return getattr(inner, name)

    def check(addresses, size, what):
        inside = np.zeros(addresses.shape, dtype=bool)
        for start, end in ranges:
            inside |= (addresses >= start) & (addresses.astype(np.int64) + size <= end)
        if not inside.all():
            raise IndexError(f"the kernel {what} {int((~inside).sum())} elements outside its arguments")

    def checked_call(self, *args, **kwargs):
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
        storages = [t.untyped_storage() for t in tensors]
        ranges[:] = {(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages}
        return call(self, *args, **kwargs)

    interpreter._interpreter, interpreter.GridExecutor.__call__ = Checked(), checked_call
    try:
        yield
    finally:
        interpreter._interpreter, interpreter.GridExecutor.__call__ = inner, call
