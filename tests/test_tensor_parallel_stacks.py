"""Our Llama under tensor parallelism and FSDP2 × tensor parallelism, compiled, checkpointed, saved and resumed.

Two and four processes, each one run for all (`tensor_parallel_stack_worker.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tensor_parallel_stack_worker import CLIP, SAVED, STEPS, VARIANTS, OneDevice, plugin
from tests.tiny import assert_same, trainer
from tests.two_processes import results

# With `--dist loadgroup` one worker takes the whole file, which has one run.
pytestmark = pytest.mark.xdist_group("tensor_parallel")


def on_gpus(count: int) -> Any:
    few = torch.cuda.device_count() < count
    marks = [pytest.mark.gpu, pytest.mark.skipif(few, reason=f"needs {count} GPUs of one machine (NCCL)")]
    return pytest.param(("gpu", count), marks=marks, id=f"gpu-{count}")


@pytest.fixture(
    scope="module", params=[pytest.param(("cpu", n), id=f"cpu-{n}") for n in (2, 4)] + [on_gpus(2), on_gpus(4)]
)
def stack(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    device, count = request.param
    folder = tmp_path_factory.mktemp("tensor_parallel_stacks")
    parts = [["variants"], ["checkpoints"]]
    ranks = results("tests.tensor_parallel_stack_worker", folder, device, parts, processes=count)
    return {"device": device, "folder": folder, "ranks": ranks, "replicas": count // 2}


def one_device(folder: Path, stack: dict[str, Any], **options: Any) -> OneDevice:
    module = OneDevice(ranks=stack["replicas"], steps=options.pop("steps", STEPS))
    ckpt_path = options.pop("ckpt_path", None)
    clip = CLIP if options["plugin"] else None
    trainer(folder, accelerator=stack["device"], gradient_clip_val=clip, **options).fit(module, ckpt_path=ckpt_path)
    return module


def losses(stack: dict[str, Any], name: str) -> list[float]:
    """The mean over the ranks that see other samples, which is the loss of their samples together."""
    assert [r[name]["losses"] for r in stack["ranks"][::2]] == [r[name]["losses"] for r in stack["ranks"][1::2]]
    return torch.tensor([r[name]["losses"] for r in stack["ranks"]]).mean(0).tolist()


def test_a_split_model_trains_as_one_device_does(stack, tmp_path) -> None:
    reference = one_device(tmp_path, stack, plugin=None)
    assert min(reference.norms) > 1.2 * CLIP
    assert reference.losses[-1] < reference.losses[0] - 0.5
    assert losses(stack, "full precision") == pytest.approx(reference.losses, rel=1e-4)
    # Each rank scales its own part of a row.
    assert losses(stack, "eager") == pytest.approx(reference.losses, rel=0.003)
    for rank in stack["ranks"]:
        assert rank["full precision"]["norms"] == pytest.approx(reference.norms, rel=1e-3)
        assert rank["eager"]["norms"][0] == pytest.approx(reference.norms[0], rel=0.02)


@pytest.mark.parametrize("variant", VARIANTS[1:])
def test_compiled_and_checkpointed_layers_change_nothing(stack, variant: str) -> None:
    for rank in stack["ranks"]:
        assert rank[variant]["losses"] == pytest.approx(rank["eager"]["losses"], rel=1e-5)
        assert rank[variant]["graphs"] == [int("compiled" in variant)] * STEPS
        assert_same(rank[variant]["thresholds"], stack["ranks"][0][variant]["thresholds"])
    assert all(table[0].isfinite().all() for table in stack["ranks"][0]["eager"]["thresholds"].values())


@pytest.mark.strict
@pytest.mark.parametrize("saved", SAVED)
def test_a_resumed_run_continues_as_if_nothing_had_happened(stack, saved: str) -> None:
    for rank in stack["ranks"]:
        assert rank[f"{saved}, resumed"]["losses"] == rank["eager"]["losses"][STEPS // 2 :]
        assert_same(rank[f"{saved}, resumed"]["thresholds"], rank["eager"]["thresholds"])


@pytest.mark.parametrize("saved", ["full", "consolidated"])
def test_one_device_takes_over(stack, saved: str, tmp_path) -> None:
    path = stack["folder"] / saved
    resumed = one_device(tmp_path, stack, plugin=plugin(), steps=STEPS // 2, max_epochs=2, ckpt_path=path)
    assert resumed.losses == pytest.approx(losses(stack, "eager")[STEPS // 2 :], rel=0.01)
