"""Checkpoints that are whole or refused: written under another name and renamed, checked against their checksums.

``torch.load`` does not compare the CRC-32 that ``torch.save`` stores for every tensor, so a flipped bit goes into the
weights unseen; a truncated file fails, with a message about archives. Lightning writes into the system's temporary
folder and moves the file, which is a copy that a crash can cut short when that folder lies on another file system.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.fabric.utilities.load import _METADATA_FILENAME, _load_distributed_checkpoint

_CHUNK = 1 << 22


class CorruptedCheckpointError(ValueError):
    """A checkpoint file is truncated or its content is not what was written."""


def verify_checkpoint(path: str | Path) -> None:
    """Reads a checkpoint file once and compares every record with its checksum.

    Takes about a second a gigabyte from a warm disk. Folders (sharded checkpoints) and addresses such as ``s3://`` are
    not looked at. Files written after ``torch.serialization.set_crc32_options(False)`` have no checksums and are
    refused.

    Args:
        path: What ``Trainer.fit(ckpt_path=...)`` takes.

    Raises:
        FileNotFoundError: There is no such file.
        CorruptedCheckpointError: It is empty, truncated or altered; the message names the other checkpoints beside it.
    """
    if "://" in str(path):
        return
    path = Path(path)
    if path.is_dir():
        return
    with open(path, "rb") as file:
        try:
            problem = _problem(file)
        except Exception as error:  # whatever zipfile makes of random bytes
            problem = str(error) or type(error).__name__
    if problem:
        raise CorruptedCheckpointError(_message(path, problem))


class VerifiedCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, written whole or not at all, and refused when they are not what was written.

    ``Trainer(plugins=[FallbackInt8Precision(), VerifiedCheckpointIO()])``. The format stays Lightning's: either reads
    the other's files. FSDP and ``ModelParallelStrategy`` load files by themselves, past any such plugin: there call
    :func:`verify_checkpoint` before ``fit``, as the ``lightning-int8`` command does.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Writes beside ``path``, flushes to disk, and only then renames over what was there.

        A write that is cut short leaves ``path`` as it was, and ``.<name>.partial`` beside it, which the next one
        overwrites.
        """
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        with open(partial, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            # Or a power cut could undo the rename.
            os.fsync(folder)
        finally:
            os.close(folder)

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., Any] | str | None = "cpu",
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Verifies the file, then loads it.

        To the CPU by its name: Lightning's default, a function that does the same, is refused by ``torch.load`` for the
        states of torchao's optimizers.

        Raises:
            FileNotFoundError: There is no such file.
            CorruptedCheckpointError: See :func:`verify_checkpoint`.
        """
        verify_checkpoint(path)
        try:
            return super().load_checkpoint(path, map_location, weights_only)
        except (RuntimeError, EOFError) as error:
            # The few bits that Python's reader of archives does not look at.
            if isinstance(error, EOFError) or "PytorchStreamReader" in str(error):
                raise CorruptedCheckpointError(_message(Path(path), str(error).split(". ")[0])) from error
            raise


def consolidate_checkpoint(folder: str | Path, file: str | Path) -> None:
    """Writes a Trainer's sharded checkpoint as one file, which every strategy resumes.

    A strategy resumes its own sharded checkpoints as they are; those of another it cannot read. Works in one process,
    which holds the whole checkpoint in memory, and writes as :class:`VerifiedCheckpointIO` does.

    Args:
        folder: What ``FSDPStrategy(state_dict_type="sharded")`` or
            ``ModelParallelStrategy(save_distributed_checkpoint=True)`` saved.
        file: Where to write.

    Raises:
        ValueError: ``folder`` is not a sharded checkpoint of a Trainer.
        FileExistsError: ``file`` exists.
    """
    folder, file = Path(folder), Path(file)
    if not (folder / _METADATA_FILENAME).is_file():
        raise ValueError(
            f"{str(folder)!r} is not a sharded checkpoint: it has no {_METADATA_FILENAME}. Give the folder that a "
            "Trainer saved under FSDP or ModelParallelStrategy; a checkpoint that is one file needs no conversion."
        )
    if file.exists():
        raise FileExistsError(f"{str(file)!r} exists; choose another name, or delete it.")
    checkpoint = _load_distributed_checkpoint(folder)
    # FSDP1 calls it "model".
    checkpoint["state_dict"] = checkpoint.pop("model", None) or checkpoint["state_dict"]
    optimizers = sorted((key for key in checkpoint if re.fullmatch(r"optimizer_\d+", key)), key=lambda k: int(k[10:]))
    checkpoint["optimizer_states"] = [checkpoint.pop(key) for key in optimizers]
    VerifiedCheckpointIO().save_checkpoint(checkpoint, file)


def _problem(file: Any) -> str:
    """What is wrong with the open file; empty if nothing is."""
    size = os.fstat(file.fileno()).st_size
    if size == 0:
        return "it is empty"
    start = file.read(4)
    if not zipfile.is_zipfile(file):
        # torch.save's format before 1.6 was a pickle without checksums.
        whole = start[:1] == b"\x80"
        return "" if whole else f"its directory, which is written last, is missing after {size:,} bytes"
    with zipfile.ZipFile(file) as archive:
        for record in archive.infolist():
            with archive.open(record) as content:
                while content.read(_CHUNK):
                    pass
        # torch's own reader wants these and reports their absence obscurely.
        names = {Path(record.filename).name for record in archive.infolist()}
    return "" if "data.pkl" in names else "it is an archive, but not one of torch.save"


def _message(path: Path, problem: str) -> str:
    others = [other for other in path.parent.glob(f"*{path.suffix}") if other != path and other.is_file()]
    others.sort(key=lambda other: other.stat().st_mtime, reverse=True)
    if others:
        advice = "resume from another checkpoint of the run, newest first: " + ", ".join(str(o) for o in others[:3])
    else:
        advice = "restore it from a backup or start the run anew; no other checkpoint lies beside it"
    return (
        f"The checkpoint {str(path)!r} is corrupted ({problem}): its writing was cut short, or the disk or a copy "
        f"altered it. Delete it and {advice}."
    )
