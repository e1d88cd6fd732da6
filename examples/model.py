"""The LightningModule that trains the decoder: AdamW with warm-up and cosine, loss and perplexity."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torchmetrics.text import Perplexity

from examples.llama import Llama, LlamaConfig

CompileMode = Literal["default", "reduce-overhead"]


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The parameters in two groups: matrices with weight decay; norms, biases and embeddings without."""
    # Told by their modules: FSDP1's shards have one dimension, whatever they are of.
    spared = {
        id(parameter)
        for child in module.modules()
        for name, parameter in child.named_parameters(recurse=False)
        if isinstance(child, nn.Embedding) or "Norm" in type(child).__name__ or "bias" in name
    }
    parameters = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if id(p) not in spared], "weight_decay": weight_decay},
        {"params": [p for p in parameters if id(p) in spared], "weight_decay": 0.0},
    ]


def warmup_cosine(step: int, warmup_steps: int, total_steps: int, floor: float) -> float:
    """Factor of the learning rate at ``step``: linear up over ``warmup_steps``, then a cosine down to ``floor``."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def parallelize(model: Llama, mesh: DeviceMesh) -> Llama:
    """Splits a decoder over ``mesh``, in place, and returns it; a second call changes nothing.

    Args:
        model: The decoder.
        mesh: With the dimensions ``"tensor_parallel"``, over which heads and feed-forward channels are split, and
            ``"data_parallel"``, over which each layer and what is left are sharded (FSDP2).

    Raises:
        ValueError: ``tensor_parallel`` does not divide the heads or the feed-forward channels.
    """
    ranks, config = mesh["tensor_parallel"].size(), model.config
    if isinstance(model, FSDPModule) or isinstance(model.layers[0].attention.q_proj.weight, DTensor):
        return model
    if ranks > 1:
        for name in ("n_kv_heads", "ffn_dim"):
            if getattr(config, name) % ranks:
                raise ValueError(
                    f"tensor_parallel_size={ranks} must divide LlamaConfig.{name}={getattr(config, name)}, which is "
                    "split over its ranks."
                )
        columns = ("attention.q_proj", "attention.k_proj", "attention.v_proj", "mlp.gate_proj", "mlp.up_proj")
        for layer in model.layers:
            names = {name for name, _ in layer.named_modules()}
            plan: dict[str, Any] = {name: ColwiseParallel() for name in columns if name in names}
            plan |= {name: RowwiseParallel() for name in ("attention.o_proj", "mlp.down_proj")}
            parallelize_module(layer, mesh["tensor_parallel"], plan)
    if ranks == 1 or mesh["data_parallel"].size() > 1:
        for module in (*model.layers, model):
            fully_shard(module, mesh=mesh["data_parallel"])
    return model


def one_by_one_on_several_meshes(optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Turns off ``foreach`` where an optimizer has tensors of several meshes, or plain ones beside DTensors.

    That is what tensor parallelism leaves, and PyTorch's optimizers, which on GPUs take all tensors together, fail
    there. To be called when they are made, since loading a checkpoint begins with a step, and again when one has been
    loaded, which brings its own setting.

    Args:
        optimizers: Changed in place.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if "foreach" in group and len({getattr(p, "device_mesh", None) for p in group["params"]}) > 1:
                group["foreach"] = False


class LlamaModule(L.LightningModule):
    """Trains a :class:`Llama` on batches of token ids ``[batch, length + 1]`` to predict each next token.

    Args:
        config: The decoder's shape.
        learning_rate: Peak learning rate.
        weight_decay: Weight decay of the linears' matrices; norms and embeddings have none.
        betas: The optimizer's momentum coefficients.
        warmup_steps: Optimizer steps over which the learning rate rises.
        min_learning_rate_fraction: Where the cosine ends, as a fraction of ``learning_rate``.
        optimizer: AdamW, or another class that takes its parameters, ``lr`` and ``betas``, such as
            ``torchao.optim.AdamW8bit`` or ``bitsandbytes.optim.AdamW8bit``.
        compile: `torch.compile`'s mode for each decoder layer; ``"reduce-overhead"`` replays CUDA graphs, without which
            a small model waits for the host; not with accumulated gradients. ``None``: eager.
    """

    def __init__(
        self,
        config: LlamaConfig,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        warmup_steps: int = 20,
        min_learning_rate_fraction: float = 0.1,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        compile: CompileMode | None = None,
    ) -> None:
        super().__init__()
        if isinstance(config, Mapping):
            config = LlamaConfig(**config)
        if not learning_rate > 0:
            raise ValueError(f"LlamaModule: learning_rate={learning_rate!r} must be above 0, such as 1e-3.")
        if warmup_steps < 0:
            raise ValueError(f"LlamaModule: warmup_steps={warmup_steps!r} must be at least 0.")
        self.config = config
        self.optimizer = optimizer
        self.replays_graphs = compile == "reduce-overhead"
        # Plain types, so that a checkpoint needs no class of this file to be read.
        self.save_hyperparameters(
            {
                "config": dataclasses.asdict(config),
                "learning_rate": learning_rate,
                "weight_decay": weight_decay,
                "betas": list(betas),
                "warmup_steps": warmup_steps,
                "min_learning_rate_fraction": min_learning_rate_fraction,
            }
        )
        self.model = Llama(config)
        # Layer by layer: the same program serves all of them, and compiles in the time of one.
        for layer in self.model.layers if compile else ():
            layer.compile(mode=compile)
        self.val_perplexity = Perplexity()
        self.test_perplexity = Perplexity()

    @property
    def vocab_size(self) -> int:
        """Number of token ids the model knows; a DataModule checks its tokenizer against it."""
        return self.config.vocab_size

    def configure_model(self) -> None:
        """Under ``ModelParallelStrategy``: splits the decoder over its mesh, see :func:`parallelize`."""
        if self.device_mesh is not None:
            parallelize(self.model, self.device_mesh)

    def on_train_start(self) -> None:
        """Lets the optimizer take weights one by one where they lie on several meshes."""
        one_by_one_on_several_meshes(self.trainer.optimizers)

    def on_fit_start(self) -> None:
        """Refuses what PyTorch computes wrongly.

        Raises:
            ValueError: Gradients are accumulated with ``compile="reduce-overhead"``: each replay overwrites those of
                the micro-batch before (pytorch/pytorch issues 96693 and 169545).
        """
        batches = self.trainer.accumulate_grad_batches
        if self.replays_graphs and batches > 1:
            raise ValueError(
                f"LlamaModule(compile='reduce-overhead') with accumulate_grad_batches={batches}: a replayed CUDA graph "
                "overwrites the gradients of the micro-batch before. Use compile='default', or larger batches and "
                "accumulate_grad_batches=1."
            )

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the token after each position of ``tokens``."""
        return self.model(tokens)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Cross entropy of the next tokens."""
        if self.replays_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        loss, _ = self._loss(batch)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Logs ``val_loss`` and ``val_perplexity``."""
        self._evaluate(batch, "val", self.val_perplexity)

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        """Logs ``test_loss`` and ``test_perplexity``."""
        self._evaluate(batch, "test", self.test_perplexity)

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """The likeliest next token after each position, ``[batch, length]``."""
        return self(batch[:, :-1]).argmax(-1)

    def generate(self, tokens: Tensor, max_new_tokens: int, **kwargs: Any) -> Tensor:
        """Continues a prompt; see :meth:`Llama.generate`. Eagerly: each length would be another graph."""
        with torch.compiler.set_stance("force_eager"):
            return self.model.generate(tokens, max_new_tokens, **kwargs)

    def configure_optimizers(self) -> dict[str, Any]:
        """The optimizer with linear warm-up and cosine decay over the Trainer's steps."""
        hparams = self.hparams
        optimizer = self.optimizer(
            parameter_groups(self, hparams["weight_decay"]), lr=hparams["learning_rate"], betas=tuple(hparams["betas"])
        )
        one_by_one_on_several_meshes([optimizer])
        total_steps = int(self.trainer.estimated_stepping_batches)
        warmup_steps, floor = hparams["warmup_steps"], hparams["min_learning_rate_fraction"]
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: warmup_cosine(step, warmup_steps, total_steps, floor)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _loss(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        logits = self(batch[:, :-1]).float()
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()), logits

    def _evaluate(self, batch: Tensor, stage: str, perplexity: Perplexity) -> None:
        loss, logits = self._loss(batch)
        perplexity(logits, batch[:, 1:])
        self.log(f"{stage}_loss", loss, prog_bar=True, sync_dist=True, batch_size=len(batch))
        self.log(f"{stage}_perplexity", perplexity)
