"""A linear layer whose weight is a DTensor: each rank multiplies its shard in INT8, as column- or row-parallel.

    column (``ColwiseParallel``)   W split over N, X whole        Y split over N      dX is a sum over ranks
    row (``RowwiseParallel``)      W split over K, X split over K  Y is a sum over ranks   dX split over K

Scales and thresholds see local blocks only. Ranks count blocks for one common threshold, as with data parallelism.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_int8.functional import int8_linear


def sharded_int8_linear(x: Tensor, weight: Tensor, bias: Tensor | None, **options: Any) -> Tensor:
    """:func:`lightning_int8.int8_linear` for a weight that ``parallelize_module`` has split over one mesh dimension.

    Args:
        x: DTensor ``[..., K]``: replicated for a column-parallel weight, sharded over K for a row-parallel one.
        weight: DTensor ``[N, K]``, ``Shard(0)`` (column-parallel) or ``Shard(1)`` (row-parallel).
        bias: DTensor ``[N]``: ``Shard(0)`` beside a column-parallel weight, replicated beside a row-parallel one.
        options: ``recipe``, ``state`` and ``update_state`` of ``int8_linear``.

    Returns:
        DTensor ``[..., N]``: sharded over N (column-parallel), or a pending sum (row-parallel).

    Raises:
        TypeError: One of the tensors is not a DTensor.
        ValueError: The tensors are laid out in another way.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    for name, tensor in (("the input", x), ("the weight", weight), ("the bias", bias)):
        if tensor is not None and not isinstance(tensor, DTensor):
            raise TypeError(
                f"Tensor-parallel INT8 linear: {name} is a plain tensor beside DTensors. Parallelize the layer with "
                "torch.distributed.tensor.parallel.ColwiseParallel or RowwiseParallel, whose hooks wrap its input; "
                "under FSDP2 call the module that fully_shard wrapped, not its layers."
            )
    layout = (*x.placements, *weight.placements, *(() if bias is None else bias.placements))
    last = x.ndim - 1
    column = (Replicate(), Shard(0), Shard(0))[: len(layout)]
    row = (Shard(last), Shard(1), Replicate())[: len(layout)]
    mesh = weight.device_mesh
    if layout not in (column, row) or mesh.ndim != 1:
        raise ValueError(
            f"Tensor-parallel INT8 linear: input {_names(x)}, weight {_names(weight)}"
            + ("" if bias is None else f", bias {_names(bias)}")
            + f" on a mesh of {mesh.ndim} dimension(s) is not supported. Use ColwiseParallel (input replicated, weight "
            f"Shard(0)) or RowwiseParallel (input Shard({last}), weight Shard(1)) on one mesh dimension, or name the "
            "layer in ignore_modules."
        )
    w = weight.to_local()
    shape = (*x.shape[:-1], weight.shape[0])
    stride = [1] * len(shape)
    for dim in range(len(shape) - 2, -1, -1):
        stride[dim] = stride[dim + 1] * shape[dim + 1]
    if layout == column:
        y = int8_linear(
            x.to_local(grad_placements=[Partial()]), w, None if bias is None else bias.to_local(), **options
        )
        placement: Any = Shard(last)
    else:
        # Each rank adds its part of the bias, which keeps the sum over ranks (or reduce-scatter) the only one.
        part = None if bias is None else bias.to_local(grad_placements=[Partial()]) / mesh.size()
        y = int8_linear(x.to_local(), w, part, **options)
        placement = Partial()
    return DTensor.from_local(y, mesh, [placement], run_check=False, shape=shape, stride=tuple(stride))


def _names(tensor: Any) -> str:
    return ", ".join(map(str, tensor.placements))
