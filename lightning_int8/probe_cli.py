"""`lightning-int8-probe`: which recipe a model bears, measured on a checkpoint and a batch of its data.

    lightning-int8-probe --config config.yaml --ckpt last.ckpt
    lightning-int8-probe --ckpt path/to/transformers-model --data notes/

The config is that of the training (`LightningCLI` leaves it beside the logs): its model and data are used, the first
`--samples` samples of the held-out data, or of the training data where none are held out.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_utilities.core.apply_func import apply_to_collection
from omegaconf import OmegaConf
from torch import Tensor, nn

from lightning_int8.arguments import positive
from lightning_int8.checkpoint import CorruptedCheckpointError, VerifiedCheckpointIO
from lightning_int8.names import check_patterns_match, matches, strip_wrappers
from lightning_int8.probe import Method, ProbeResult, methods, probe
from lightning_int8.probe_report import draw, outlier_table, summary_table, write_csv, write_summary

Step = Callable[[], Tensor]


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="lightning-int8-probe", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ckpt", type=Path, required=True, help="checkpoint, state dict or transformers folder")
    parser.add_argument("--config", type=Path, help="LightningCLI YAML with model and data; not for transformers")
    parser.add_argument("--data", help="text file or folder; with --config it replaces data.init_args.path")
    parser.add_argument("--ignore", nargs="*", help="linears to leave out; default: lm_head, where there is one")
    parser.add_argument("--samples", type=positive, default=4, help="sequences of the batch (%(default)s)")
    parser.add_argument("--length", type=positive, default=1024, help="tokens a sequence, transformers (%(default)s)")
    parser.add_argument(
        "--small",
        type=float,
        default=0.5,
        help="share of the tokens, by ‖dY‖, whose gradients count as small (%(default)s)",
    )
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="which to compare; all by default")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="%(default)s")
    parser.add_argument("--output", type=Path, default=Path("runs/probe"), help="folder of the results (%(default)s)")
    arguments = parser.parse_args(argv)
    if not arguments.ckpt.exists():
        parser.error(f"--ckpt={arguments.ckpt} does not exist.")
    if not 0 < arguments.small < 1:
        parser.error(f"--small={arguments.small} must lie between 0 and 1.")
    if arguments.ckpt.is_dir():
        if arguments.data is None:
            parser.error("a transformers folder needs --data, a text file or a folder of them.")
    elif arguments.config is None:
        parser.error(f"--ckpt={arguments.ckpt} is a file: --config must name the YAML it was trained with.")
    elif not arguments.config.is_file():
        parser.error(f"--config={arguments.config} does not exist.")
    try:
        arguments.device = torch.device(arguments.device)
    except RuntimeError:
        parser.error(f"--device={arguments.device} is no device; take cpu or cuda.")
    if arguments.device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device={arguments.device}: PyTorch sees no CUDA GPU here; take --device cpu.")
    return arguments


def main(argv: Sequence[str] | None = None, compared: Mapping[str, Method] | None = None) -> ProbeResult:
    """Runs the command and returns what it measured.

    Args:
        argv: The command line's arguments; those of this process when ``None``.
        compared: See :func:`lightning_int8.probe.probe`.
    """
    from rich.console import Console

    # As `python -m` does: a console script otherwise sees only installed packages.
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    arguments = parse_arguments(argv)
    compared = _chosen(methods() if compared is None else compared, arguments.methods)
    model, step = _from_transformers(arguments) if arguments.ckpt.is_dir() else _from_config(arguments)
    names = [strip_wrappers(name) for name, _ in model.named_modules()]
    if arguments.ignore is None:
        arguments.ignore = ["lm_head"] if any(matches("lm_head", name) for name in names) else []
    try:
        check_patterns_match(arguments.ignore, names)
    except ValueError as error:
        raise SystemExit(str(error).replace("ignore_modules", "--ignore", 1)) from None
    # Dropout would differ between the passes that are compared.
    model.eval()
    console = Console()
    # What the summary needs; in a narrower window lines that wrap are better than numbers that are cut.
    console.width = max(console.width, 130)
    with console.status("Probing …"):
        result = probe(model, step, compared, ignore_modules=arguments.ignore, small_share=arguments.small)
    arguments.output.mkdir(parents=True, exist_ok=True)
    write_csv(result, arguments.output / "probe.csv")
    write_summary(result, arguments.output / "summary.csv")
    draw(result, arguments.output / "probe.png")
    console.print(outlier_table(result))
    console.print(summary_table(result))
    console.print(f"{arguments.output}: probe.csv  summary.csv  probe.png", highlight=False)
    return result


def _chosen(compared: Mapping[str, Method], names: Sequence[str] | None) -> Mapping[str, Method]:
    """Those of ``names``; all when ``None``."""
    if names is None:
        return compared
    if unknown := [name for name in names if name not in compared]:
        raise SystemExit(f"--methods: unknown {_quoted(unknown)}; there are: {_quoted(compared)}.")
    return {name: compared[name] for name in names}


def _quoted(names: Iterable[str]) -> str:
    # Some names hold commas.
    return ", ".join(map(repr, names))


def _autocast(device: torch.device) -> Any:
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


def _from_config(arguments: argparse.Namespace) -> tuple[nn.Module, Step]:
    """The model and a training step of the config, on the first batch of its held-out data."""
    module, data = _instantiated(arguments)
    _set_up(module, data)
    try:
        saved = VerifiedCheckpointIO().load_checkpoint(arguments.ckpt)
    except CorruptedCheckpointError as error:
        raise SystemExit(f"--ckpt: {error}") from None
    module.load_state_dict(saved.get("state_dict", saved))
    module.to(arguments.device)
    batch = module.transfer_batch_to_device(_first_batch(data), arguments.device, 0)
    batch = _beginning(batch, arguments.samples)

    def step() -> Tensor:
        with _autocast(arguments.device), warnings.catch_warnings():
            # Its Trainer has nowhere to log to.
            warnings.filterwarnings("ignore", message="You are trying to `self.log")
            loss = module.training_step(batch, 0)
        loss = loss["loss"] if isinstance(loss, dict) else loss
        if not isinstance(loss, Tensor):
            raise SystemExit(f"{type(module).__qualname__}.training_step returned no loss, whose gradients are needed.")
        return loss

    return module, step


def _instantiated(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """The config's LightningModule, and its LightningDataModule, or the module where it has loaders of its own."""
    import lightning.pytorch as pl
    from jsonargparse import ArgumentError, ArgumentParser

    from lightning_int8.cli import instantiate

    where = f"--config={arguments.config}"
    try:
        # As `fit` reads it, with `${...}` resolved.
        content = OmegaConf.to_container(OmegaConf.load(arguments.config), resolve=True)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise SystemExit(f"{where}: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or "class_path" not in (content.get("model") or {}):
        raise SystemExit(f"{where} names no model: it needs model.class_path.")
    config: dict[str, Any] = {key: content[key] for key in ("model", "data") if content.get(key) is not None}
    if arguments.data is not None:
        config.setdefault("data", {}).setdefault("init_args", {})["path"] = arguments.data
    parser = ArgumentParser(parser_mode="omegaconf", exit_on_error=False)
    parser.add_subclass_arguments(pl.LightningModule, "model")
    if "data" in config:
        parser.add_subclass_arguments(pl.LightningDataModule, "data")
    try:
        parsed = parser.parse_object(config)
    except ArgumentError as error:
        raise SystemExit(f"{where}: {' '.join(str(error).split())}") from None
    if "data" in config and "batch_size" in parsed.data.get("init_args", {}):
        # No more than needed; what has no batch_size gives batches that are cut.
        parsed.data.init_args.batch_size = arguments.samples
    made = instantiate(parser, parsed)
    return made.model, made.data if "data" in config else made.model


def _set_up(module: Any, data: Any) -> None:
    """Calls the hooks in which modules and data may make layers and datasets, as ``fit`` does."""
    import lightning.pytorch as pl

    # Trains nothing and logs nowhere, but hooks ask for it. What it says of itself would only confuse.
    log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = log.level
    log.setLevel(logging.WARNING)
    trainer = pl.Trainer(accelerator="cpu", devices=1, barebones=True)
    log.setLevel(level)
    module.trainer = trainer
    trainer.strategy.connect(module)
    if data is not module:
        data.trainer, trainer.datamodule = trainer, data
    for each in dict.fromkeys((data, module)):
        each.prepare_data()
    for each in dict.fromkeys((data, module)):
        each.setup("fit")
    module.configure_model()


def _first_batch(data: Any) -> Any:
    """Of the held-out data; of the training data where there are none."""
    for name in ("val_dataloader", "train_dataloader"):
        if not is_overridden(name, data):
            continue
        loaders = getattr(data, name)()
        for batch in loaders[0] if isinstance(loaders, (list, tuple)) and loaders else loaders or ():
            if name == "train_dataloader":
                print("No held-out data: probing a batch of the training data.")
            return batch
    raise SystemExit(f"{type(data).__qualname__} gives no batch: neither val_dataloader nor train_dataloader has one.")


def _beginning(batch: Any, samples: int) -> Any:
    """The first samples of a batch, where all its tensors have as many."""
    sizes: list[int] = []
    apply_to_collection(batch, Tensor, lambda tensor: sizes.extend(tensor.shape[:1]))
    if not sizes or min(sizes) <= samples:
        return batch
    if len(set(sizes)) > 1:
        print(f"--samples={samples} is not used: the batch's tensors have first sizes of {min(sizes)} to {max(sizes)}.")
        return batch
    return apply_to_collection(batch, Tensor, lambda tensor: tensor[:samples] if tensor.ndim else tensor)


def _from_transformers(arguments: argparse.Namespace) -> tuple[nn.Module, Step]:
    """A causal language model of transformers and its loss on the beginning of the text."""
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ModuleNotFoundError:
        raise SystemExit("A transformers folder needs transformers: pip install transformers.") from None
    device = arguments.device
    model = AutoModelForCausalLM.from_pretrained(arguments.ckpt, dtype=torch.float32).to(device)
    tokenizer = AutoTokenizer.from_pretrained(arguments.ckpt)
    ids = torch.tensor(tokenizer(_text(Path(arguments.data)), return_attention_mask=False)["input_ids"])
    samples = min(arguments.samples, len(ids) // arguments.length)
    if samples == 0:
        raise SystemExit(f"--data={arguments.data} has {len(ids)} tokens, fewer than --length={arguments.length}.")
    batch = ids[: samples * arguments.length].view(samples, -1).to(device)

    def step() -> Tensor:
        with _autocast(device):
            return model(input_ids=batch, labels=batch, use_cache=False).loss

    return model, step


def _text(path: Path) -> str:
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    texts = []
    for file in files:
        try:
            texts.append(file.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, OSError) as error:
            if path.is_file():
                raise SystemExit(f"--data={path} is not readable UTF-8 text: {error}") from None
    if not texts:
        raise SystemExit(f"--data={path} holds no readable UTF-8 text.")
    return "\n".join(texts)


if __name__ == "__main__":
    main()
