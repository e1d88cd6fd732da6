"""A YAML that makes a run of the example's configs small enough for a test on a CPU, to be given after them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tests.faulty_run import text

CONFIGS = Path(__file__).parents[1] / "examples" / "configs"
SHAPE = {"vocab_size": 300, "dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 96, "max_seq_len": 32}


def write(folder: Path, run: str, steps: int, **model: Any) -> Path:
    """Writes it; every third step is saved as ``folder / run / step=N.ckpt``. ``model`` are ``LlamaModule``'s."""
    checkpoints = {"dirpath": str(folder / run), "filename": "{step}", "every_n_train_steps": 3, "save_top_k": -1}
    config = {
        "trainer": {
            "accelerator": "cpu",
            "max_steps": steps,
            "limit_val_batches": 0,
            "logger": False,
            "default_root_dir": str(folder),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [
                {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": checkpoints},
            ],
        },
        "model": {"init_args": {"config": SHAPE, "warmup_steps": 2, **model}},
        "data": {
            "init_args": {
                "path": str(text(folder)),
                "cache_dir": str(folder / "cache"),
                "sequence_length": 32,
                "batch_size": 4,
                "vocab_size": SHAPE["vocab_size"],
            }
        },
    }
    path = folder / f"{run}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path
