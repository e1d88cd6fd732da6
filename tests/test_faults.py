"""Processes that die anywhere resume from the last whole checkpoint with the same losses; broken ones are refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from lightning_int8 import CorruptedCheckpointError, VerifiedCheckpointIO, verify_checkpoint
from lightning_int8.cli import main
from tests.faulty_run import EVERY, run, text
from tests.two_processes import DEVICES, ROOT, launch, logs

pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed")
STEPS = 12
DEATHS = {"killed": "step-11", "cut": "save-8", "lightning-cut": "save-8"}


def losses(folder: Path, rank: int = 0) -> list[str]:
    return (folder / f"losses{rank}.txt").read_text().splitlines()


@pytest.fixture(scope="module", autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def died(tmp_path: Path) -> Path:
    """One uninterrupted run, and one for each way to die, side by side."""
    folder = tmp_path
    run(folder, "whole", STEPS)
    processes = {}
    for name, death in DEATHS.items():
        (folder / f"tmp-{name}").mkdir()
        processes[name] = subprocess.Popen(
            [sys.executable, "-m", "tests.faulty_run", str(folder), "cpu", f"{name}:{STEPS}:{death}"], cwd=ROOT,
            env={**os.environ, "TMPDIR": str(folder / f"tmp-{name}")}, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    for name, process in processes.items():
        _, errors = process.communicate(timeout=120)
        assert process.returncode == -(signal.SIGKILL if name == "killed" else signal.SIGXFSZ), errors
    return folder


@pytest.mark.strict
def test_a_dead_run_continues_as_if_nothing_had_happened(died: Path) -> None:
    expected = losses(died / "whole")
    for name, last in (("killed", 8), ("cut", 4), ("lightning-cut", 4)):
        whole = sorted((died / name).glob("*.ckpt"))
        assert [path.name for path in whole] == [f"step={step}.ckpt" for step in range(EVERY, last + 1, EVERY)]
        for path in whole:
            verify_checkpoint(path)
        run(died, f"{name}-resumed", STEPS, resume=f"{name}/step={last}.ckpt")
        # Two batches make a step.
        assert losses(died / f"{name}-resumed") == expected[2 * last :]
        killed = losses(died / name)
        assert killed == expected[: len(killed)]

    # What a cut write leaves behind: beside the checkpoints, or with Lightning's own in the temporary folder for good.
    partial = died / "cut" / ".step=8.ckpt.partial"
    assert partial.stat().st_size == 100_000
    with pytest.raises(CorruptedCheckpointError, match="missing after 100,000 bytes"):
        verify_checkpoint(partial)
    left = [path for path in (died / "tmp-lightning-cut").iterdir() if path.is_file()]
    assert [path.stat().st_size for path in left] == [100_000]


def test_the_next_write_replaces_a_partial_file(tmp_path: Path) -> None:
    (tmp_path / ".a.ckpt.partial").write_bytes(b"cut short")
    VerifiedCheckpointIO().save_checkpoint({"n": 1}, tmp_path / "a.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]
    assert VerifiedCheckpointIO().load_checkpoint(tmp_path / "a.ckpt") == {"n": 1}


@pytest.mark.strict
@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_one_of_two_ranks_dies(tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # A quarter of what NCCL's watchdog, when an answer is overdue, waits for dumps before it ends the process.
    monkeypatch.setenv("TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC", "1000")

    def start(folder: str, task: str) -> list[int]:
        (tmp_path / folder).mkdir(exist_ok=True)
        text(tmp_path / folder)
        return launch("tests.faulty_run", tmp_path / folder, device, task, gpus=device == "gpu")

    with ThreadPoolExecutor() as pool:
        whole = pool.submit(start, "a", f"whole:{STEPS}")
        codes = start("b", f"killed:{STEPS}:rank1-11")
    assert whole.result() == [0, 0], logs(tmp_path / "a")
    assert codes[1] == -signal.SIGKILL, logs(tmp_path / "b")
    # The other one notices, and does not wait for ever.
    assert codes[0] not in (0, -signal.SIGKILL), logs(tmp_path / "b")
    killed = tmp_path / "b" / "killed"
    assert sorted(path.name for path in killed.glob("*.ckpt")) == ["step=4.ckpt", "step=8.ckpt"]
    assert start("b", f"resumed:{STEPS}::killed/step=8.ckpt") == [0, 0], logs(tmp_path / "b")
    for rank in range(2):
        expected = losses(tmp_path / "a" / "whole", rank)
        assert len(expected) == 2 * STEPS
        assert losses(tmp_path / "b" / "resumed", rank) == expected[2 * 8 :]
    assert losses(tmp_path / "a" / "whole", 0) != losses(tmp_path / "a" / "whole", 1)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    weight = torch.randn(300, 64, generator=torch.Generator().manual_seed(0))
    for step in (4, 8):
        state = {"state_dict": {"model.lm_head.weight": weight}, "global_step": step}
        VerifiedCheckpointIO().save_checkpoint(state, tmp_path / f"killed/step={step}.ckpt")
    return tmp_path / "killed/step=8.ckpt"


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 4
    path.write_bytes(content)


def test_a_flipped_bit_is_refused_where_torch_loads_it(checkpoint: Path) -> None:
    before = torch.load(checkpoint, weights_only=True)["state_dict"]["model.lm_head.weight"]
    at = checkpoint.read_bytes().index(before.numpy().tobytes())
    flip(checkpoint, at + 3)
    after = torch.load(checkpoint, weights_only=True)["state_dict"]["model.lm_head.weight"]
    assert not torch.equal(before, after)
    with pytest.raises(CorruptedCheckpointError) as caught:
        run(checkpoint.parents[1], "again", STEPS, resume="killed/step=8.ckpt")
    said = str(caught.value)
    assert f"{str(checkpoint)!r} is corrupted (Bad CRC-32" in said
    assert f"newest first: {checkpoint.with_name('step=4.ckpt')}" in said


@pytest.mark.parametrize("kept", [0, 1, 1000, -1])
def test_a_truncated_file_is_refused(checkpoint: Path, kept: int) -> None:
    checkpoint.write_bytes(checkpoint.read_bytes()[:kept])
    checkpoint.with_name("step=4.ckpt").unlink()
    with pytest.raises(CorruptedCheckpointError, match=r"step=8\.ckpt' is corrupted \(it.*no other checkpoint lies"):
        VerifiedCheckpointIO().load_checkpoint(checkpoint)


def test_any_flipped_bit_is_refused_or_harmless(tmp_path: Path) -> None:
    path, io = tmp_path / "a.ckpt", VerifiedCheckpointIO()
    io.save_checkpoint({"tensor": torch.arange(200.0), "n": 3}, path)
    whole = path.read_bytes()
    for position in range(0, len(whole), 7):
        path.write_bytes(whole)
        flip(path, position)
        try:
            loaded = io.load_checkpoint(path)
        except CorruptedCheckpointError:
            continue
        assert loaded["n"] == 3
        assert torch.equal(loaded["tensor"], torch.arange(200.0))


def test_missing_files_folders_addresses_and_old_formats(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing"):
        verify_checkpoint(tmp_path / "nothing.ckpt")
    verify_checkpoint(tmp_path)
    verify_checkpoint("s3://bucket/a.ckpt")
    torch.save({"n": 3}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    assert VerifiedCheckpointIO().load_checkpoint(tmp_path / "old.ckpt") == {"n": 3}


def test_the_command_line_refuses_what_last_turns_out_to_be(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    saver = '[{"class_path": "ModelCheckpoint", "init_args": {"save_last": true}}]'
    common = ["--model=tests.tiny.TinyModule", "--trainer.accelerator=cpu", f"--trainer.default_root_dir={tmp_path}"]
    common += [f"--trainer.callbacks={saver}", "--trainer.logger=false"]
    main(["fit", *common, "--trainer.max_epochs=1"])
    (last,) = tmp_path.rglob("last.ckpt")
    main(["fit", *common, "--trainer.max_epochs=2", "--ckpt_path=last"])
    last = max(tmp_path.rglob("last*.ckpt"), key=lambda path: path.stat().st_mtime)
    flip(last, last.stat().st_size // 2)
    with pytest.raises(CorruptedCheckpointError, match="is corrupted"):
        main(["fit", *common, "--trainer.max_epochs=3", "--ckpt_path=last"])


def test_the_command_line_refuses_it_in_one_line(checkpoint: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    flip(checkpoint, checkpoint.stat().st_size // 2)
    arguments = ["--model=tests.tiny.TinyModule", "--trainer.logger=false", f"--ckpt_path={checkpoint}"]
    with pytest.raises(SystemExit):
        main(["fit", *arguments])
    assert f"ckpt_path: The checkpoint {str(checkpoint)!r} is corrupted" in capsys.readouterr().err
