"""One of two gloo processes: tensor-parallel scenarios of `test_tensor_parallel.py`.

Started with torchrun's environment variables: `python -m tests.tensor_parallel_worker FOLDER`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lightning_int8 import FallbackInt8Precision, convert_to_int8, int8_linear, update_thresholds
from tests.tiny import RECIPE, TinyModel, TinyModule, batches, thresholds, trainer


def parallelize(model: TinyModel, mesh: DeviceMesh, sequence: bool = False) -> TinyModel:
    """Splits each block as Megatron does; ``sequence``: tokens are split between the blocks' products."""
    column = ColwiseParallel(input_layouts=Shard(0) if sequence else Replicate())
    row = RowwiseParallel(output_layouts=Shard(0) if sequence else Replicate())
    for layer in model.layers:
        parallelize_module(layer, mesh, {"up_proj": column, "down_proj": row})
    return model


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()


def build(kind: str, mesh: DeviceMesh) -> nn.Module:
    torch.manual_seed(1)
    model: Any = TinyModel()
    if kind == "full precision":
        return model
    if kind == "converted first":
        convert_to_int8(model, RECIPE)
    if kind != "one device":
        parallelize(model, mesh)
    if kind != "converted first":
        convert_to_int8(model, RECIPE)
    if kind == "compiled":
        for layer in model.layers:
            layer.compile(backend="aot_eager")
    return model


def steps(model: nn.Module, x: Tensor) -> dict[str, Any]:
    """Two steps; gradients of the second, first outputs and the thresholds."""
    first = model(x).detach()
    for _ in range(2):
        model.zero_grad()
        model(x).square().mean().backward()
        update_thresholds(model)
    gradients = {name: whole(p.grad) for name, p in model.named_parameters()}
    return {"first": first, "gradients": gradients, "thresholds": thresholds(model)}


def sequence_parallel(mesh: DeviceMesh, x: Tensor) -> dict[str, Any]:
    """A block with tokens split between its products: the input is gathered, the output reduce-scattered."""
    torch.manual_seed(1)
    model = parallelize(TinyModel(), mesh, sequence=True)
    convert_to_int8(model, RECIPE)
    layer = model.layers[0]
    shard = x.chunk(2)[dist.get_rank()].clone().requires_grad_()
    out = layer(shard)
    out.square().sum().backward()
    return {"out": out.detach(), "dx": shard.grad, "dw": whole(layer.down_proj.weight.grad)}


def refusals(mesh: DeviceMesh) -> dict[str, str]:
    said = {}

    def attempt(name: str, call: Any) -> None:
        try:
            call()
        except (TypeError, ValueError) as error:
            said[name] = str(error)

    x, weight = torch.randn(4, 8), torch.randn(8, 8)
    replicated, split = distribute_tensor(weight, mesh, [Replicate()]), distribute_tensor(weight, mesh, [Shard(0)])
    attempt("function", lambda: int8_linear(x, split))
    linear = nn.Linear(8, 8, bias=False)
    convert_to_int8(linear, RECIPE)
    linear.weight = nn.Parameter(split)
    attempt("plain input", lambda: linear(x))
    linear.weight = nn.Parameter(replicated)
    attempt("layout", lambda: linear(distribute_tensor(x, mesh, [Replicate()])))
    return said


class TensorParallel(TinyModule):
    def configure_model(self) -> None:
        if not isinstance(self.model.layers[0].up_proj.weight, DTensor):
            parallelize(self.model, self.device_mesh["tensor_parallel"])


def lightning(folder: Path, plugin: FallbackInt8Precision | None) -> dict[str, Any]:
    model = TensorParallel(steps=6)
    strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2, save_distributed_checkpoint=False)
    run = trainer(folder, plugin=plugin, strategy=strategy, devices=2)
    run.fit(model)
    run.save_checkpoint(folder / "tensor_parallel.ckpt")
    return {"losses": model.losses, "weights": {name: whole(p) for name, p in model.named_parameters()}}


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    results: dict[str, Any] = {
        "plain Trainer": lightning(folder / "plain", None),
        "Trainer": lightning(folder / "int8", FallbackInt8Precision(RECIPE, precision="32-true")),
    }
    mesh = init_device_mesh("cpu", (2,))
    x, _ = batches(1)
    for kind in ("full precision", "one device", "parallelized first", "converted first", "compiled"):
        model = build(kind, mesh)
        results[kind] = steps(model, x) if kind != "full precision" else plain_steps(model, x)
    results["sequence parallel"] = sequence_parallel(mesh, x)
    results["refusals"] = refusals(mesh)
    torch.save(results, folder / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()


def plain_steps(model: nn.Module, x: Tensor) -> dict[str, Any]:
    model(x).square().mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    layer = model.layers[0]
    x = x.clone().requires_grad_()
    layer.zero_grad()
    out = layer(x)
    out.square().sum().backward()
    block = {"out": out.detach(), "dx": x.grad, "dw": layer.down_proj.weight.grad}
    return {"gradients": {k: v.clone() for k, v in gradients.items()}, "block": block}


if __name__ == "__main__":
    main()
