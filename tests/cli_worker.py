"""The command line in one of two processes: `python -m tests.cli_worker FOLDER ARGUMENTS`."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist

from lightning_int8.cli import main

if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[2:])
    dist.barrier()
    dist.destroy_process_group()
