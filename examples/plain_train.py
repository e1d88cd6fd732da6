"""INT8 training in a plain PyTorch loop: convert once, move the thresholds after each optimizer step.

python -m examples.plain_train --recipe block --steps 20
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F

from examples.data import TextDataModule
from examples.llama import Llama, LlamaConfig
from lightning_int8 import convert_to_int8, update_thresholds
from lightning_int8.arguments import positive


def main(argv: list[str] | None = None) -> list[float]:
    """Trains and returns the loss of every step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="row")
    parser.add_argument("--steps", type=positive, default=20)
    parser.add_argument("--text", help="text file or folder; default: Python's standard library")
    arguments = parser.parse_args(argv)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    data = TextDataModule(path=arguments.text, batch_size=8, vocab_size=1024)
    data.prepare_data()
    data.setup()
    model = Llama(LlamaConfig(vocab_size=1024, n_layers=2)).to(device)
    print(convert_to_int8(model, recipe=arguments.recipe, ignore_modules=["lm_head"]).summary())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    losses = []
    for step, batch in zip(range(arguments.steps), data.train_dataloader(), strict=False):
        batch = batch.to(device)
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        update_thresholds(model)
        losses.append(loss.item())
        print(f"step {step + 1}: loss {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    main()
