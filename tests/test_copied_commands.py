"""The commands that docs/support.md gives to copy, made small: those of several GPUs over gloo processes."""

from __future__ import annotations

import json
import random
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from lightning.fabric.utilities.load import _load_distributed_checkpoint

from tests import small_config
from tests.cli_worker import run
from tests.two_processes import ROOT, launch, logs

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter", "ignore:The dirpath has changed")

BLOCK = (ROOT / "docs/support.md").read_text().partition("## To copy")[2].partition("```bash\n")[2].partition("```")[0]
LINES = dict(reversed(line.split("  # ")) for line in BLOCK.splitlines())
# Their tests need a model in a folder: `test_examples_finetune.py`.
COMMANDS = {name: line for name, line in LINES.items() if "examples.finetune" not in line}
DISTRIBUTED = {name for name, line in COMMANDS.items() if re.search(r"devices|fsdp|parallel", line)}


@pytest.fixture(autouse=True)
def _eager() -> Iterator[None]:
    # What is compiled is compared with eager elsewhere, and inductor takes half a minute.
    with torch.compiler.set_stance("force_eager"):
        yield


def small(folder: Path, name: str, checkpoint: Path | None = None) -> list[str]:
    """The command's words, for a tiny model on the CPU; what it saves after three steps is ``folder / name``."""
    words = shlex.split(LINES[name].replace("examples/configs", str(small_config.CONFIGS)))
    words = [str(checkpoint) if word == "last.ckpt" else word for word in words]
    if words[0] == "python":
        text = folder / "long.txt"
        choose = random.Random(0)
        text.write_text("\n".join(" ".join(choose.choices("abcdefghij", k=40)) for _ in range(1200)))
        words = [*words[2:], "--text", str(text), "--steps", "3"]
        on_cpu = ["--accelerator", "cpu", "--precision", "32-true", "--checkpoint", str(folder / name)]
        return words if "plain" in words[0] else words + on_cpu
    # Before the options under test. Under FSDP1 autocast is not what it is elsewhere.
    config = small_config.write(folder, name, 6 if checkpoint else 3)
    words[4:4] = ["--config", str(config), "--trainer.plugins.init_args.precision", "32-true"]
    if name == "FSDP":
        strategy = folder / "strategy.yaml"
        strategy.write_text(
            yaml.safe_dump({"trainer": {"strategy": {"class_path": "tests.distributed_worker.CpuFSDPStrategy"}}})
        )
        words += ["--config", str(strategy)]
    return words


def launched(folder: Path, names: list[str], processes: int) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "commands.json").write_text(json.dumps([small(folder, name) for name in names]))
    if any(launch("tests.cli_worker", folder, processes=processes)):
        pytest.fail(logs(folder))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every strategy's checkpoint after three steps: two processes, then four, each one run for all."""
    folder = tmp_path_factory.mktemp("copied")
    four = sorted(name for name in DISTRIBUTED if "devices 4" in LINES[name])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHDYNAMO_DISABLE", "1")
        launched(folder, sorted(DISTRIBUTED - set(four)), 2)
        launched(folder, four, 4)
    return folder


def weights(path: Path) -> dict[str, torch.Tensor]:
    """What a Trainer or Fabric saved, whole or in shards."""
    saved = _load_distributed_checkpoint(path) if path.is_dir() else torch.load(path, weights_only=True)
    return saved.get("state_dict") or saved["model"]


@pytest.mark.slow
def test_strategies_from_their_files_train_alike(folder: Path) -> None:
    trained = {name: weights(saved(folder, name)) for name in DISTRIBUTED}
    for name, like in (
        ("FSDP", "DDP"),
        ("FSDP2", "DDP"),
        ("Fabric, FSDP", "Fabric, DDP"),
        ("Fabric, FSDP2", "Fabric, DDP"),
    ):
        assert trained[name].keys() == trained[like].keys()
        for key, expected in trained[like].items():
            # AdamW has moved each weight by about this much. The norm to clip is added up in another order, which INT8
            # and AdamW magnify.
            moved = 2e-3 * expected.numel() ** 0.5
            assert (trained[name][key] - expected).norm() < 1e-2 * moved, f"{name}, {key}"
    for name in ("tensor parallel", "FSDP2 × tensor parallel"):
        assert {key: t.shape for key, t in trained[name].items()} == {key: t.shape for key, t in trained["DDP"].items()}
        assert all(t.isfinite().all() for t in trained[name].values())


def saved(folder: Path, name: str) -> Path:
    return folder / name if "Fabric" in name else folder / name / "step=3.ckpt"


@pytest.mark.parametrize("name", sorted(COMMANDS.keys() - DISTRIBUTED))
def test_it_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = None
    if "last.ckpt" in LINES[name]:
        run(small(tmp_path, "one GPU"))
        checkpoint = saved(tmp_path, "one GPU")
    if name == "energy":
        with pytest.raises(RuntimeError, match="EnergyMonitor reads NVIDIA GPUs, but the run is on 'cpu'"):
            run(small(tmp_path, name))
        return
    run(small(tmp_path, name, checkpoint))
    if name != "plain PyTorch" and not name.startswith("validate"):
        assert (tmp_path / name / f"step={6 if checkpoint else 3}.ckpt").exists()
