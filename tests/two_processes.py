"""Starts a module as two processes with torchrun's environment variables, and waits for both."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


# For fixtures: what their tests run on, gloo and a CPU or NCCL and two GPUs.
DEVICES = (
    "cpu",
    pytest.param(
        "gpu",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs of one machine (NCCL)"),
        ],
    ),
)


def launch(module: str, folder: Path, *arguments: str, timeout: float = 200.0, gpus: bool = False) -> list[int]:
    """Runs ``python -m module folder arguments`` twice, as ranks 0 and 1, on this machine's CPU or ``gpus``.

    Returns:
        The exit codes; output is in ``folder/rank0.log`` and ``folder/rank1.log``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        **os.environ,
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
        **{"GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        **{"GLOO_SOCKET_IFNAME": "lo"},
        **({} if gpus else {"CUDA_VISIBLE_DEVICES": ""}),
    }
    workers = []
    for rank in range(2):
        with open(folder / f"rank{rank}.log", "w") as log:
            workers.append(
                subprocess.Popen(
                    [sys.executable, "-m", module, str(folder), *arguments],
                    cwd=ROOT,
                    env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    try:
        for worker in workers:
            worker.wait(timeout=timeout)
    except subprocess.TimeoutExpired:
        pass  # its exit code tells
    finally:
        for worker in workers:
            worker.kill()
    return [worker.wait() for worker in workers]


def logs(folder: Path) -> str:
    """The end of both logs, for a failure's message."""
    return "\n".join(f"rank {rank}:\n" + (folder / f"rank{rank}.log").read_text()[-3000:] for rank in range(2))
