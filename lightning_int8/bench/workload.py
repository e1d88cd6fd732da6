"""The model whose layers and training step are timed: from a LightningCLI config, a transformers folder or a function.

The optimizer is always fused AdamW, and a config's Trainer is not run: the table compares precisions, not trainers.
"""

from __future__ import annotations

import copy
import importlib
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_int8.convert import convert_to_int8
from lightning_int8.recipe import Int8Recipe
from lightning_int8.small_layers import MinFeatures

LONGEST_SEQUENCE = 2048


@dataclass(frozen=True)
class Workload:
    """A model, a batch for it, and what of it stays in full precision.

    Attributes:
        name: Its heading.
        model: On ``device``, in float32.
        batch: What ``loss`` takes.
        tokens: Tokens in ``batch``.
        loss: From a model like ``model`` and ``batch`` to the training loss, to be called under autocast.
        ignore_modules: Patterns of the layers that stay in full precision.
        recipe: What the config trains with; ``None`` where it does not say.
        min_features: Below which features it leaves layers in full precision.
        shapes: The names of the linears that a conversion would take, by (in-features, out-features).
    """

    name: str
    model: nn.Module
    batch: Any
    tokens: int
    loss: Callable[[nn.Module, Any], Tensor]
    ignore_modules: tuple[str, ...] = ()
    recipe: Int8Recipe | None = None
    min_features: MinFeatures = 0
    shapes: dict[tuple[int, int], list[str]] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shapes", linear_shapes(self.model, self.ignore_modules))

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device


def linear_shapes(model: nn.Module, ignore_modules: Sequence[str]) -> dict[tuple[int, int], list[str]]:
    """The names of the linears that a conversion would take, by (in-features, out-features), commonest first."""
    report = convert_to_int8(_without_values(model), "row", list(ignore_modules))
    names: dict[tuple[int, int], list[str]] = {}
    for row in report.rows:
        if row.status == "converted":
            names.setdefault((row.in_features or 0, row.out_features or 0), []).append(row.name)
    counts = Counter({shape: len(group) for shape, group in names.items()})
    return {shape: names[shape] for shape, _ in counts.most_common()}


def load(config: str, tokens: int, device: torch.device) -> Workload:
    """The workload that ``--config`` names.

    Args:
        config: A LightningCLI YAML file (as for ``lightning-int8 fit``), a folder with a transformers ``config.json``,
            or ``module:function`` of a function that makes a causal language model: token ids to logits, with
            ``config.vocab_size``.
        tokens: Tokens a batch; a YAML's own data decide for themselves.
        device: Where to train.

    Raises:
        ValueError: ``config`` is none of these, or its model has no layer to convert.
        ModuleNotFoundError: A folder is given and transformers is not installed.
    """
    # As `python -m` does: a console script otherwise sees only installed packages.
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    if (Path(config) / "config.json").is_file():
        return _from_transformers(config, tokens, device)
    if Path(config).is_file():
        return _from_lightning(config, device)
    module, colon, function = config.partition(":")
    if colon:
        with device:
            model = getattr(importlib.import_module(module), function)()
        return _language_model(function, model, tokens, device, _next_token_loss)
    raise ValueError(
        f"--config {config} must be a LightningCLI YAML file, a folder with a transformers config.json, or "
        "package.module:function of a function that makes a causal language model."
    )


def _from_transformers(folder: str, tokens: int, device: torch.device) -> Workload:
    from transformers import AutoConfig, AutoModelForCausalLM

    with device:
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    return _language_model(Path(folder).resolve().name, model, tokens, device, lambda m, ids: m(ids, labels=ids).loss)


def _from_lightning(file: str, device: torch.device) -> Workload:
    from lightning.pytorch.cli import LightningCLI

    from lightning_int8.energy import count_tokens
    from lightning_int8.plugin_core import Int8PluginCore

    # No logger and no callback, which would write files; the Trainer only tells which plugin it was given.
    quiet = ("--trainer.logger=false", "--trainer.callbacks=null", "--trainer.enable_checkpointing=false")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
        cli = LightningCLI(
            run=False, parser_kwargs={"parser_mode": "omegaconf"}, save_config_callback=None,
            args=["--config", file, *quiet],
        )  # fmt: skip
    # Both have these hooks, and a model without a DataModule has loaders of its own.
    data = cli.datamodule or cli.model
    data.prepare_data()
    data.setup("fit")
    batch = cli.model.transfer_batch_to_device(next(iter(data.train_dataloader())), device, 0)
    plugin = cli.trainer.precision_plugin
    ours = plugin if isinstance(plugin, Int8PluginCore) else None
    return Workload(
        name=Path(file).stem,
        model=cli.model.to(device).train(),
        batch=batch,
        tokens=count_tokens(batch),
        loss=lambda model, batch: _loss_of(model.training_step(batch, 0)),  # type: ignore[operator]
        ignore_modules=tuple(ours.ignore_modules or ()) if ours else (),
        recipe=ours.recipe if ours else None,
        min_features=ours.min_features if ours else 0,
    )


def _loss_of(output: Any) -> Tensor:
    loss = output["loss"] if isinstance(output, dict) else output
    if not isinstance(loss, Tensor):
        raise ValueError(f"training_step returned {type(loss).__name__}; it must return the loss or {{'loss': ...}}.")
    return loss


def _next_token_loss(model: nn.Module, ids: Tensor) -> Tensor:
    return F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def _language_model(
    name: str, model: nn.Module, tokens: int, device: torch.device, loss: Callable[[nn.Module, Any], Tensor]
) -> Workload:
    config: Any = model.config
    longest: int = getattr(config, "max_seq_len", 0) or getattr(config, "max_position_embeddings", LONGEST_SEQUENCE)
    length = min(longest, LONGEST_SEQUENCE, tokens)
    ids = torch.randint(config.vocab_size, (tokens // length, length), device=device)
    head = ("lm_head",) if hasattr(model, "lm_head") else ()
    return Workload(name, model.train(), ids, ids.numel(), loss, head)


def _without_values(model: nn.Module) -> nn.Module:
    """A copy of ``model`` whose parameters and buffers take no memory."""
    memo = {id(t): nn.Parameter(torch.empty_like(t, device="meta")) for t in model.parameters()}
    memo |= {id(t): torch.empty_like(t, device="meta") for t in model.buffers()}
    return copy.deepcopy(model, memo)
