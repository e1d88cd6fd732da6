"""Fine-tunes any causal language model of transformers in INT8, on your text.

python -m examples.finetune path/to/model --text notes/ --steps 100 --out runs/finetuned
python -m examples.finetune Qwen/Qwen2.5-0.5B --text notes/ --precision bf16-mixed --lora-rank 16

The model is a folder that `save_pretrained` wrote (model and tokenizer), or a name on the Hugging Face hub. The result
is such a folder again, in full precision. The output head stays in full precision while training. So do the adapters of
LoRA, which are merged into the weights at the end.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn

from examples.data import TokenStream, TokenWindows
from examples.model import parameter_groups
from examples.text import read_text, split_by_file
from lightning_int8 import FallbackInt8Precision
from lightning_int8.arguments import positive


def warmup_linear(step: int, steps: int) -> float:
    """Factor of the learning rate at ``step``: linear up to 1 over a tenth of the steps, then linear down."""
    warmup = max(1, steps // 10)
    return min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))


class FineTuner(L.LightningModule):
    """Trains a causal language model of transformers on token ids ``[batch, length + 1]``.

    Args:
        model: The model, with transformers' interface.
        learning_rate: Peak learning rate of AdamW, after a tenth of the steps.
    """

    def __init__(self, model: nn.Module, learning_rate: float = 2e-5) -> None:
        super().__init__()
        self.model = model
        self.learning_rate = learning_rate

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Cross entropy of the next tokens."""
        # The model shifts the labels itself.
        loss = self.model(input_ids=batch, labels=batch, use_cache=False).loss
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Logs ``val_loss``."""
        loss = self.model(input_ids=batch, labels=batch, use_cache=False).loss
        self.log("val_loss", loss, prog_bar=True, sync_dist=True, batch_size=len(batch))

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW with linear warm-up and decay."""
        optimizer = torch.optim.AdamW(parameter_groups(self, 0.01), lr=self.learning_rate, betas=(0.9, 0.95))
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_linear(step, steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def load(name: str) -> tuple[nn.Module, Any]:
    """The model and its tokenizer, from a folder or the hub.

    Raises:
        SystemExit: transformers is missing, or there is no such model.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ModuleNotFoundError:
        raise SystemExit("Fine-tuning needs transformers: pip install transformers.") from None
    folder = Path(name).expanduser()
    # A hub name is `model` or `owner/model`; everything else can only be a path.
    if not folder.exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise SystemExit(
            f"The model folder {name!r} does not exist; give one that save_pretrained wrote, or a hub name."
        )
    if folder.exists() and not (folder / "config.json").exists():
        raise SystemExit(f"{name!r} holds no config.json; give a folder that model.save_pretrained wrote.")
    source = str(folder) if folder.exists() else name
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    except (OSError, ValueError) as error:
        where = "in that folder" if folder.exists() else "on the hub or in its cache (is there a network?)"
        raise SystemExit(f"Cannot load {name!r} {where}: {str(error).splitlines()[0]}") from error
    return model, tokenizer


def with_adapters(model: nn.Module, rank: int) -> Any:
    """``model`` with LoRA adapters of ``rank`` on every linear layer but the head, and nothing else trainable.

    Raises:
        SystemExit: peft is missing.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ModuleNotFoundError:
        raise SystemExit("--lora-rank needs peft: pip install peft.") from None
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))


def tokenize(tokenizer: Any, texts: list[str]) -> np.ndarray:
    """The token ids of ``texts`` one after another, with the end-of-text token between, where there is one."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = [token for text in texts for token in (*tokenizer(text, add_special_tokens=False)["input_ids"], *end)]
    return np.array(ids, dtype=np.uint32)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Trains, saves and returns the last losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder that save_pretrained wrote, or hub name")
    parser.add_argument("--text", help="text file or folder; default: Python's standard library")
    parser.add_argument("--recipe", default="row")
    parser.add_argument("--precision", default="bf16-mixed" if torch.cuda.is_available() else "32-true")
    parser.add_argument("--steps", type=positive, default=100)
    parser.add_argument("--sequence-length", type=positive, default=512)
    parser.add_argument("--batch-size", type=positive, default=8)
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--lora-rank", type=int, default=0, help="train LoRA adapters of this rank; 0: all weights")
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--out", type=Path, default=Path("runs/finetuned"), help="folder for the result")
    arguments = parser.parse_args(argv)
    if arguments.lora_rank < 0:
        parser.error(f"--lora-rank={arguments.lora_rank} must be at least 0.")

    L.seed_everything(0, verbose=False)
    model, tokenizer = load(arguments.model)
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and arguments.sequence_length + 1 > longest:
        parser.error(f"--sequence-length {arguments.sequence_length} is too long for the model: at most {longest - 1}.")
    train, held_out = (tokenize(tokenizer, part) for part in split_by_file(read_text(arguments.text), 0.05))
    stream = TokenStream(train, arguments.sequence_length, arguments.batch_size)
    windows = TokenWindows(held_out, arguments.sequence_length)
    validation = torch.utils.data.DataLoader(windows, batch_size=arguments.batch_size) if len(windows) else None

    head = model.get_output_embeddings()
    trained = with_adapters(model, arguments.lora_rank) if arguments.lora_rank else model
    ignored = [name for name, child in trained.named_modules() if child is head]
    ignored += ["lora_A", "lora_B"] if arguments.lora_rank else []
    trainer = L.Trainer(
        accelerator=arguments.accelerator,
        devices=1,
        max_steps=arguments.steps,
        plugins=FallbackInt8Precision(arguments.recipe, arguments.precision, ignore_modules=ignored or None),
        gradient_clip_val=1.0,
        limit_val_batches=20,
        val_check_interval=arguments.steps,
        check_val_every_n_epoch=None,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trained.train()
    trainer.fit(FineTuner(trained, arguments.learning_rate), stream, validation)
    model = trained.merge_and_unload() if arguments.lora_rank else model
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    losses = {name: float(value) for name, value in trainer.callback_metrics.items()}
    print(f"Wrote {arguments.out}: " + ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items()))
    return losses


if __name__ == "__main__":
    main()
