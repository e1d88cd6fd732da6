"""Starts a module as two (or more) processes with torchrun's environment variables, and waits for all."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

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


def add_up_in_order(device: str) -> None:
    """On a ``"gpu"`` all but one of attention's backward kernels add up in no fixed order."""
    if device == "cpu":
        return
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)


def launch(module: str, folder: Path, *arguments: str, gpus: bool = False, processes: int = 2) -> list[int]:
    """Runs ``python -m module folder arguments`` as ranks 0, 1 and so on, on this machine's CPU or ``gpus``.

    Returns:
        The exit codes; output is in ``folder/rank0.log`` and so on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        **os.environ,
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        **{"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)},
        **{"GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        **{"GLOO_SOCKET_IFNAME": "lo"},
        **({} if gpus else {"CUDA_VISIBLE_DEVICES": ""}),
    }
    workers = []
    for rank in range(processes):
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
    # Below pytest's own limit, so that a failure shows the logs.
    end = time.monotonic() + (130 if gpus else 270)
    try:
        for worker in workers:
            worker.wait(timeout=max(0.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        pass  # its exit code tells
    finally:
        for worker in workers:
            worker.kill()
    return [worker.wait() for worker in workers]


def results(module: str, folder: Path, device: str, parts: list[list[str]], **options: Any) -> list[dict[str, Any]]:
    """What each rank of ``module`` saved in ``rank<N>.pt``, started once for each of ``parts``.

    On GPUs, whose machines have many cores, all parts at the same time; on a CPU one worker does all of them in turn.
    """
    if device == "cpu":
        parts = [[name for part in parts for name in part]]
    # Beside what the workers themselves save under the parts' names.
    folders = [folder / f"worker-{'-'.join(part)}" for part in parts]
    with ThreadPoolExecutor(len(parts)) as pool:
        running = [
            pool.submit(launch, module, here, device, *part, gpus=device == "gpu", **options)
            for here, part in zip(folders, parts, strict=True)
        ]
    failed = [here for here, codes in zip(folders, running, strict=True) if any(codes.result())]
    if failed:
        pytest.fail("\n".join(map(logs, failed)))
    ranks: list[dict[str, Any]] = []
    for rank in range(options.get("processes", 2)):
        files = [torch.load(here / f"rank{rank}.pt", weights_only=True) for here in folders]
        ranks.append({name: result for file in files for name, result in file.items()})
    return ranks


def logs(folder: Path) -> str:
    """The ends of all logs, for a failure's message."""
    return "\n".join(f"{log.stem}:\n{log.read_text()[-3000:]}" for log in sorted(folder.glob("rank*.log")))
