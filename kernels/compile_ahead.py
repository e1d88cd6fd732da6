"""Compiling ahead, side by side: Triton takes some 2 seconds a kernel, and compiles each where it is first launched.

:func:`noted` runs a piece of work whose launches are noted instead of made, and returns what they would compile, each
a picklable :class:`Kernel`. :func:`side_by_side` calls those, or any other jobs, in worker processes. What they compile
stays in Triton's (and Inductor's) cache on disk, where this process finds it.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_int8.kernels.launch import CachedLaunch, kind, noting_launches


@dataclass(frozen=True)
class _Pointer:
    dtype: torch.dtype
    offset: int

    def make(self) -> Tensor:
        storage = torch.empty(32, dtype=torch.int8, device="cuda")
        return storage[self.offset : self.offset + 16].view(self.dtype)


@dataclass(frozen=True)
class _Descriptor:
    """Of Gluon."""

    dtype: torch.dtype
    block_shape: tuple[int, ...]
    layout: Any

    def make(self) -> Any:
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

        shape = list(self.block_shape)
        return TensorDescriptor.from_tensor(torch.empty(shape, dtype=self.dtype, device="cuda"), shape, self.layout)


@dataclass(frozen=True)
class Kernel:
    """A kernel with what its compilation depends on; calling it compiles it for the current GPU without launching it.

    Attributes:
        module: Where the kernel is.
        name: What it is called there.
        args: Arguments, tensors and descriptors by what matters of them.
        constants: Those passed by name.
    """

    module: str
    name: str
    args: tuple[Any, ...]
    constants: tuple[tuple[str, Any], ...]

    def __call__(self) -> None:
        """Compiles, in a process with a GPU."""
        kernel = getattr(importlib.import_module(self.module), self.name)
        args = [arg.make() if isinstance(arg, _Pointer | _Descriptor) else arg for arg in self.args]
        kernel.kernel.run(*args, grid=(1,), warmup=True, **dict(self.constants))


def noted(work: Callable[[], object]) -> list[Kernel]:
    """The kernels that ``work`` would launch, each once. Its results are undefined, but their shapes and dtypes."""
    found: dict[Any, Kernel] = {}

    def note(launched: CachedLaunch, args: tuple[Any, ...], constants: dict[str, Any]) -> None:
        kernel = launched.kernel
        kinds = (
            type(arg) if parameter.do_not_specialize else kind(arg)
            for arg, parameter in zip(args, kernel.params, strict=False)
        )
        key = (kernel.fn.__module__, kernel.fn.__name__, *kinds, *constants.items())
        if key not in found:
            found[key] = Kernel(*key[:2], tuple(map(_described, args)), tuple(constants.items()))

    with noting_launches(note):
        work()
    return list(found.values())


def _described(arg: Any) -> Any:
    if isinstance(arg, Tensor):
        return _Pointer(arg.dtype, arg.data_ptr() % 16)
    if hasattr(arg, "block_shape"):
        return _Descriptor(arg.base.dtype, tuple(arg.block_shape), arg.layout)
    return arg


def default_workers() -> int:
    """One a CPU core that this process may use and 4 GiB of the current GPU's memory, at most 24."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return max(1, min(cores, memory >> 32, 24))


def side_by_side(jobs: Sequence[Callable[[], object]], workers: int, seconds: float) -> Iterator[tuple[int, str]]:
    """Calls ``jobs`` in fresh processes, the first ones first, and yields each as it ends.

    Args:
        jobs: Picklable.
        workers: At most so many processes; each has a CUDA context of its own.
        seconds: After so many, what still runs is stopped; so it is when the caller stops iterating.

    Yields:
        A job's index and the first line of its error, or ``""``.
    """
    if not jobs:
        return
    until = time.monotonic() + seconds
    context = multiprocessing.get_context("spawn")
    with _single_threaded(), context.Pool(min(workers, len(jobs)), _quiet) as pool:
        ended = pool.imap_unordered(_call, enumerate(jobs))
        try:
            while True:
                yield ended.next(max(0.0, until - time.monotonic()))
        except StopIteration:
            # Processes that end by themselves clean up; leaving the pool would kill them.
            pool.close()
            pool.join()
        except multiprocessing.TimeoutError:
            return


@contextlib.contextmanager
def _single_threaded() -> Iterator[None]:
    """Workers, which inherit the environment, compile in one thread each: Inductor would start a pool of its own."""
    name = "TORCHINDUCTOR_COMPILE_THREADS"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _quiet() -> None:
    """What a worker prints would break the caller's progress bar; its errors are returned."""
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    os.dup2(sink, 2)


def _call(job: tuple[int, Callable[[], object]]) -> tuple[int, str]:
    index, run = job
    try:
        run()
    except Exception as error:
        return index, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
    finally:
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
    return index, ""
