"""Commands in one of several processes: `python -m tests.cli_worker FOLDER`, where FOLDER has them in `commands.json`.

Each is a list of words: `lightning-int8` or the name of a module with a `main`, and its arguments. The recipe `row`
rounds to nearest here, so that strategies can be compared closely: see `tiny.NEAREST_RECIPE`.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from examples import fabric_train
from lightning_int8.recipe import PRESETS
from tests.checkpoint_worker import without_offload
from tests.fabric_worker import CpuFSDPStrategy


def run(words: list[str]) -> None:
    name, *arguments = words
    importlib.import_module("lightning_int8.cli" if name == "lightning-int8" else name).main(arguments)


if __name__ == "__main__":
    torch.set_num_threads(1)
    without_offload()
    fabric_train.FSDPStrategy = CpuFSDPStrategy
    PRESETS["row"] = dataclasses.replace(PRESETS["row"], stochastic_rounding="nothing")
    # Scripts keep their cache under the working directory.
    os.chdir(sys.argv[1])
    for words in json.loads(Path("commands.json").read_text()):
        run(words)
    dist.barrier()
    dist.destroy_process_group()
