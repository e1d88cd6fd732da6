"""`lightning-int8 fit|validate|test|predict`: a LightningCLI for your own model and data, or this project's.

    lightning-int8 fit --config config.yaml
    lightning-int8 fit --trainer.plugins.help=lightning_int8.FallbackInt8Precision

Model and data are named by `class_path`, also in modules of the current folder. Configs may use `${...}` interpolation.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningCLI

from lightning_int8.checkpoint import CorruptedCheckpointError, verify_checkpoint
from lightning_int8.precision import FallbackInt8Precision


class _VerifyResumed(Callback):
    """Verifies what "last", "best" and the like turn out to be, when it is loaded and before it is trained."""

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: Any) -> None:
        path = trainer.ckpt_path
        if path and os.path.isfile(path):
            verify_checkpoint(path)


class Int8CLI(LightningCLI):
    """A LightningCLI that reports the plugin's wrong values or a corrupted checkpoint in one line, before the Trainer.

    A checkpoint that is named in words ("last", "best") is verified when Lightning has found it.

    The model's arguments come from the config and the command line alone, also when a checkpoint is resumed.
    """

    def _parse_ckpt_path(self) -> None:
        """Lightning would put the checkpoint's hyperparameters over the config; it fails where they name no class."""

    def parse_arguments(self, parser: Any, args: Any) -> None:
        """Verifies the checkpoint."""
        super().parse_arguments(parser, args)
        path = self.config[self.config.subcommand].get("ckpt_path")
        # "last", "best" and the like are no files: see `_VerifyResumed`.
        if path and os.path.isfile(path):
            try:
                verify_checkpoint(path)
            except CorruptedCheckpointError as error:
                parser.error(f"ckpt_path: {error}")

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Adds what verifies a checkpoint that is named in words; a file is verified already."""
        trainer = super().instantiate_trainer(**kwargs)
        path = self.config[self.subcommand].get("ckpt_path")
        if path and not os.path.isfile(path):
            trainer.callbacks.append(_VerifyResumed())  # type: ignore[attr-defined]
        return trainer

    def before_instantiate_classes(self) -> None:
        """Lightning calls this between parsing and instantiation."""
        plugins = self.config[self.subcommand].trainer.plugins
        for plugin in plugins if isinstance(plugins, list) else [plugins]:
            if str(getattr(plugin, "class_path", "")).rpartition(".")[2] != "FallbackInt8Precision":
                continue
            try:
                FallbackInt8Precision(**plugin.init_args.as_dict())
            except (TypeError, ValueError) as error:
                self.parser.error(f"trainer.plugins.init_args: {error}")


def instantiate(parser: ArgumentParser, parsed: Any) -> Any:
    """Makes the objects of parsed arguments."""
    # `instantiate_classes` is deprecated since jsonargparse 4.49, which brought `instantiate`.
    return (getattr(parser, "instantiate", None) or parser.instantiate_classes)(parsed)


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line; ``args`` are the process's when ``None``."""
    # As `python -m` does: a console script otherwise sees only installed packages.
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    Int8CLI(
        parser_kwargs={"parser_mode": "omegaconf"},
        # The config beside the logs is of the latest run, also when a run is started again in its folder.
        save_config_kwargs={"overwrite": True},
        args=None if args is None else list(args),
    )


if __name__ == "__main__":
    main()
