"""What both runs of a comparison share: a whole `lightning-int8 fit` config, with what the command line overrides.

What a config asks for is honoured or refused by name. Only what a comparison does in its own way is set aside: where
and how often it evaluates, saves and logs.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from jsonargparse import ArgumentError, ArgumentParser
from omegaconf import OmegaConf

from examples.data import TextDataModule
from examples.model import LlamaModule
from lightning_int8 import FallbackInt8Precision, resolve_recipe
from lightning_int8.cli import instantiate

CONFIGS = Path(__file__).parent / "configs"
# A config meant for a long training is cut to this, so that the comparison stays a matter of minutes.
MAX_DEFAULT_STEPS = 300
# What the only classes that a comparison runs are called in a config.
CLASSES = {
    "model": "examples.model.LlamaModule",
    "data": "examples.data.TextDataModule",
    "trainer.plugins": "lightning_int8.FallbackInt8Precision",
}
PASSED_ON = ("accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm")
READ = ("accelerator", "devices", "max_steps", "limit_val_batches", "plugins", "callbacks")
# Where and how often a run evaluates, saves and logs.
OWN_WAY = (
    "val_check_interval",
    "check_val_every_n_epoch",
    "num_sanity_val_steps",
    "log_every_n_steps",
    "logger",
    "default_root_dir",
    "enable_progress_bar",
    "enable_model_summary",
)
OWN_CALLBACKS = ("FallbackRateMonitor", "ModelCheckpoint")


@dataclass(frozen=True)
class Plan:
    """What both runs share.

    Attributes:
        model: Arguments of ``LlamaModule``; ``warmup_steps`` at most a sixth of the steps.
        data: Arguments of ``TextDataModule``.
        plugin: Arguments of the INT8 run's ``FallbackInt8Precision``; its ``precision`` is that of both runs.
        trainer: Further arguments of both runs' ``Trainer``.
        steps: Optimizer steps.
        val_batches: Held-out batches of an evaluation, or a share of them.
        seed: Of weights and, unless ``data`` has its own, batches.
        accelerator: ``"cpu"`` or ``"gpu"``.
    """

    model: dict[str, Any]
    data: dict[str, Any]
    plugin: dict[str, Any]
    trainer: dict[str, Any]
    steps: int
    val_batches: int | float
    seed: int
    accelerator: str

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Plan:
        """Reads the config and lets the command line override it.

        Raises:
            ValueError: The config is no whole one, asks for what a comparison does not do, or holds a bad value; or a
                GPU is asked for that is not there.
        """
        # As `fit` reads it, with `${...}` resolved.
        config: Any = OmegaConf.to_container(OmegaConf.load(arguments.config), resolve=True)
        if not isinstance(config, Mapping):
            raise ValueError(f"it is no mapping with trainer, model and data; {_name_another()}")
        trainer = config.get("trainer") or {}
        plugins = trainer.get("plugins")
        if isinstance(plugins, list) and len(plugins) == 1:
            plugins = plugins[0]
        parts = {"model": config.get("model"), "data": config.get("data"), "trainer.plugins": plugins}
        found = {name: _init_args(name, part) for name, part in parts.items()}
        _refuse_the_rest(config, trainer)

        model, data, plugin = (dict(found[name]) for name in ("model", "data", "trainer.plugins"))
        accelerator = _accelerator(arguments.accelerator or trainer.get("accelerator", "auto"))
        default = "32-true" if accelerator == "cpu" else plugin.get("precision", "bf16-mixed")
        plugin["precision"] = arguments.precision or default
        if plugin["precision"] == "16-mixed" and accelerator == "cpu":
            raise ValueError("precision 16-mixed needs a GPU; on a CPU take --precision bf16-mixed or 32-true.")
        if arguments.recipe is not None:
            plugin["recipe"] = arguments.recipe
        FallbackInt8Precision(**plugin)

        steps = arguments.steps or trainer.get("max_steps", -1)
        if arguments.steps is None:
            steps = MAX_DEFAULT_STEPS if steps < 1 else min(steps, MAX_DEFAULT_STEPS)
        model["warmup_steps"] = min(model.get("warmup_steps", 20), max(1, steps // 6))
        seed = config.get("seed_everything", 0) if arguments.seed is None else arguments.seed
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise ValueError(f"seed_everything: {seed!r} must be a number, the same for both runs; or give --seed.")
        overrides = {
            "path": arguments.text,
            "batch_size": arguments.batch_size,
            "cache_dir": arguments.cache_dir,
            "seed": arguments.seed,
        }
        data |= {key: value for key, value in overrides.items() if value is not None}
        data.setdefault("seed", seed)
        val_batches = arguments.val_batches or trainer.get("limit_val_batches")
        if val_batches == 0:
            raise ValueError("trainer.limit_val_batches: 0 leaves nothing to compare; give --val-batches.")
        try:
            _parser().parse_object({"model": model, "data": data})
        except ArgumentError as error:
            raise ValueError(str(error)) from None
        return cls(
            model=model,
            data=data,
            plugin=plugin,
            trainer={name: trainer[name] for name in PASSED_ON if trainer.get(name) is not None},
            steps=steps,
            val_batches=16 if val_batches is None else val_batches,
            seed=seed,
            accelerator=accelerator,
        )

    def make(self) -> tuple[LlamaModule, TextDataModule]:
        """A new model and its data, made as ``fit`` makes them: an optimizer may be given by its name."""
        parser = _parser()
        made = instantiate(parser, parser.parse_object({"model": self.model, "data": self.data}))
        return made.model, made.data

    @property
    def precision(self) -> Any:
        """Precision of both runs."""
        return self.plugin["precision"]

    @property
    def recipe(self) -> str:
        """The INT8 run's recipe in a word: a preset, with a plus where its fields are changed."""
        given = self.plugin.get("recipe", "row")
        name = resolve_recipe(given).describe()
        return f"{given.get('preset', 'row')}+" if name.startswith("Int8Recipe(") else name


def _parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(LlamaModule, "model")
    parser.add_class_arguments(TextDataModule, "data")
    return parser


def _name_another() -> str:
    return f"name a whole config, such as {CONFIGS / 'tiny.yaml'}."


def _init_args(name: str, part: Any) -> dict[str, Any]:
    path = CLASSES[name]
    if not isinstance(part, Mapping) or "class_path" not in part:
        raise ValueError(
            f"it has no {name}.class_path; is it one to put over another (lightning-int8 fit --config a --config b)? "
            f"Then {_name_another()}"
        )
    if part["class_path"] != path:
        raise ValueError(
            f"{name}.class_path: {part['class_path']} is not {path}, which alone is compared; train it with "
            "lightning-int8 fit."
        )
    return part.get("init_args") or {}


def _refuse_the_rest(config: Mapping[str, Any], trainer: Mapping[str, Any]) -> None:
    """Whatever else differs from its default, which a config that LightningCLI saved spells out."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(L.Trainer).parameters.items()}
    refused = [name for name in config if name not in ("seed_everything", "trainer", "model", "data")]
    refused = [name for name in refused if config[name] is not None]
    for name, value in trainer.items():
        if name not in (*PASSED_ON, *READ, *OWN_WAY) and not (name in defaults and value == defaults[name]):
            refused.append(f"trainer.{name}")
    if trainer.get("devices", 1) not in (1, "1", "auto"):
        refused.append(f"trainer.devices={trainer['devices']} (one device is used)")
    callbacks = trainer.get("callbacks") or []
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        path = str(callback.get("class_path") if isinstance(callback, Mapping) else callback)
        if path.rpartition(".")[2] not in OWN_CALLBACKS:
            refused.append(f"trainer.callbacks: {path}")
    if refused:
        raise ValueError(
            f"a comparison does not honour {', '.join(refused)}. Leave it out of the config, or train with "
            "lightning-int8 fit."
        )


def _accelerator(asked: str) -> str:
    """``"cpu"`` or ``"gpu"``."""
    if asked not in ("auto", "cpu", "gpu", "cuda"):
        raise ValueError(f"accelerator: {asked!r} must be auto, cpu or gpu.")
    there = torch.cuda.is_available()
    if asked in ("gpu", "cuda") and not there:
        raise ValueError("accelerator gpu: PyTorch sees no CUDA GPU here; take --accelerator cpu or auto.")
    return "gpu" if there and asked != "cpu" else "cpu"
