"""On one GPU: 8-bit optimizers, CUDA graphs, two thousand steps, and the energy of INT8 against BF16."""

from __future__ import annotations

import csv
import gc
import resource
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.train_step import MODELS
from examples.model import LlamaModule
from lightning_int8 import (
    EnergyMonitor,
    FallbackInt8Precision,
    VerifiedCheckpointIO,
    convert_to_int8,
    update_thresholds,
)
from tests.tiny import BATCH, GPU_RECIPE, TinyModel, TinyModule, assert_same, batches, thresholds, trainer

pytestmark = pytest.mark.gpu


class Squares(TinyModule):
    """Linears of one shape, so that an optimizer which compiles its step compiles once."""

    WIDTH, DEPTH = 1024, 8

    def __init__(self, optimizer: Any, steps: int = 3) -> None:
        super().__init__(steps)
        torch.manual_seed(1)
        self.optimizer = optimizer
        self.model = nn.Sequential(*(nn.Linear(self.WIDTH, self.WIDTH, bias=False) for _ in range(self.DEPTH)))

    def loss(self, batch: Any) -> torch.Tensor:
        x = batch[0].repeat(1, self.WIDTH // batch[0].shape[1])
        return (self.model(x) - x).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters(), lr=1e-4)


def optimizer_class(name: str) -> Any:
    module, _, cls = name.rpartition(".")
    return getattr(pytest.importorskip(module), cls)


class StateSize(pl.Callback):
    """Bytes on the GPU, without the weights, when training ends."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        torch.cuda.synchronize()
        self.bytes = -torch.cuda.memory_allocated()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pl_module.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        self.bytes += torch.cuda.memory_allocated()


@pytest.mark.parametrize("name", ["torchao.optim.AdamW8bit", "bitsandbytes.optim.AdamW8bit"])
def test_8bit_optimizer_saves_memory_and_resumes(tmp_path, measured, name) -> None:
    def fit(optimizer: Any, steps: int, **kwargs: Any) -> tuple[Squares, float]:
        model, size = Squares(optimizer, steps), StateSize()
        options = {"accelerator": "gpu", "callbacks": [size], "max_epochs": -1, "max_steps": steps}
        run = trainer(tmp_path, plugin=[FallbackInt8Precision("row"), VerifiedCheckpointIO()], **options)
        run.fit(model, **kwargs)
        run.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return model, size.bytes / (Squares.WIDTH**2 * Squares.DEPTH)

    optimizer = optimizer_class(name)
    _, full = fit(torch.optim.AdamW, 3)
    first, eighth = fit(optimizer, 3)
    measured(f"AdamW, {name}: bytes of state a parameter", f"{full:.2f}, {eighth:.2f}")
    assert full == pytest.approx(8, abs=0.2)
    assert eighth == pytest.approx(2, abs=0.2)

    whole, _ = fit(optimizer, 6)
    rest = DataLoader(TensorDataset(*batches(6)), BATCH, sampler=range(3 * BATCH, 6 * BATCH))
    resumed, _ = fit(optimizer, 6, train_dataloaders=rest, ckpt_path=tmp_path / "3.ckpt")
    assert first.losses + resumed.losses == whole.losses
    assert_same(dict(resumed.named_parameters()), dict(whole.named_parameters()))


def small(compiled: str | None = None) -> tuple[nn.Module, Any]:
    torch.manual_seed(1)
    model = TinyModel().cuda()
    convert_to_int8(model, GPU_RECIPE)
    return model, torch.compile(model, mode=compiled) if compiled else model


def loss_of(forward: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cuda", torch.bfloat16):
        return F.cross_entropy(forward(x).float(), y)


def eager_steps(x: torch.Tensor, y: torch.Tensor, steps: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    model, _ = small()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, capturable=True)
    losses = []
    for _ in range(steps):
        loss = loss_of(model, x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        update_thresholds(model)
        losses.append(loss.item())
    return losses, thresholds(model)


def test_a_whole_step_runs_as_a_cuda_graph(measured) -> None:
    x, y = (t.cuda() for t in batches(1))
    model, _ = small()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, capturable=True)

    def step() -> torch.Tensor:
        loss = loss_of(model, x, y)
        loss.backward()
        optimizer.step()
        update_thresholds(model)
        return loss

    losses = []
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            losses.append(step().item())
            optimizer.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    for _ in range(17):
        graph.replay()
        losses.append(loss.item())
    expected, expected_thresholds = eager_steps(x, y, 20)
    assert losses == expected
    assert_same(thresholds(model), expected_thresholds)
    measured("milliseconds a step: eager, replayed", f"{clock(step):.2f}, {clock(graph.replay):.2f}")


def clock(call: Any, runs: int = 20) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(runs):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / runs


def test_reduce_overhead_uses_cuda_graphs() -> None:
    from torch._dynamo.utils import counters
    from torch._inductor.cudagraph_trees import get_manager

    torch._dynamo.reset()
    counters.clear()
    x, y = (t.cuda() for t in batches(1))
    model, forward = small("reduce-overhead")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, capturable=True)
    losses = []
    for _ in range(10):
        torch.compiler.cudagraph_mark_step_begin()
        loss = loss_of(forward, x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        update_thresholds(model)
        losses.append(loss.item())
    expected, _ = eager_steps(x, y, 10)
    manager = get_manager(torch.cuda.current_device(), create_if_none_exists=False)
    assert manager is not None
    assert list(manager.get_roots())
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert counters["stats"]["unique_graphs"] == 1
    assert losses == expected


class Memory(pl.Callback):
    """Bytes on the GPU and resident on the host, and graphs compiled, after some steps."""

    def __init__(self, steps: tuple[int, ...]) -> None:
        self.steps = steps
        self.seen: dict[int, tuple[int, int, int, int]] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step in self.steps:
            from torch._dynamo.utils import counters

            torch.cuda.synchronize()
            now = (
                torch.cuda.memory_allocated(),
                torch.cuda.memory_reserved(),
                counters["stats"]["unique_graphs"],
                resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            )
            self.seen[trainer.global_step] = now
            print(f"step {trainer.global_step}, {time.monotonic() - self.began:.1f} s:", *now, flush=True)

    def on_train_start(self, *_: Any) -> None:
        self.began = time.monotonic()


def test_two_thousand_steps_in_flat_memory(tmp_path, measured) -> None:
    memory = Memory((200, 1000, 2000))

    class Compiled(TinyModule):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            torch.compiler.cudagraph_mark_step_begin()
            loss = self.loss(batch)
            if batch_idx % 100 == 99:
                self.losses.append(loss.item())
            return loss

    model = Compiled(steps=2000)
    model.model.compile(mode="reduce-overhead")
    run = trainer(tmp_path, plugin=FallbackInt8Precision(GPU_RECIPE), accelerator="gpu", callbacks=[memory])
    run.fit(model)
    for step, (allocated, reserved, graphs, resident) in memory.seen.items():
        sizes = f"{allocated / 2**20:.2f}, {reserved / 2**20:.2f}, {resident / 2**20:.0f} MiB, {graphs}"
        measured(f"step {step}: allocated, reserved, host peak, graphs", sizes)
    first, _, last = memory.seen.values()
    assert last[:3] == first[:3]
    assert last[3] - first[3] < 64 * 2**20
    # Chance is log(8), 2.08.
    assert model.losses[-1] < 1.5


class Tokens(pl.LightningDataModule):
    def __init__(self, vocab_size: int, length: int, batch: int, steps: int) -> None:
        super().__init__()
        self.ids = torch.randint(vocab_size, (batch * steps, length + 1))
        self.batch = batch

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.ids, self.batch)


class Stays(SingleDeviceStrategy):
    def teardown(self) -> None:
        """Lightning would copy 12 GB to the host."""


# The first eight steps compile.
WARM, MEASURED = 8, 40
GRID = 400.0


def test_energy_of_int8_against_bf16(tmp_path, measured) -> None:
    pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed: pip install 'lightning-int8[energy]'")
    config, joules = MODELS["1b"], {}
    for name in ("bf16", "row"):
        torch.manual_seed(0)
        with torch.device("cuda"):
            model = LlamaModule(config, compile="reduce-overhead")
        int8 = FallbackInt8Precision(name, ignore_modules=["lm_head"]) if name != "bf16" else None
        precision = {} if int8 else {"precision": "bf16-mixed"}
        logger = CSVLogger(tmp_path / name, flush_logs_every_n_steps=1)
        callbacks = [EnergyMonitor(every_n_steps=WARM, grid_intensity=GRID), Seconds()]
        options = {"accelerator": "gpu", "strategy": Stays("cuda:0"), "logger": logger, "callbacks": callbacks}
        data = Tokens(config.vocab_size, config.max_seq_len, 8, WARM + MEASURED)
        trainer(tmp_path, plugin=int8, **options, **precision).fit(model, data)
        with open(Path(logger.log_dir) / "metrics.csv") as file:
            rows = [row for row in csv.DictReader(file) if row["energy/kwh"]]
        kwh, grams = (float(rows[-1][key]) - float(rows[0][key]) for key in ("energy/kwh", "energy/co2e_g"))
        tokens = MEASURED * 8 * (config.max_seq_len + 1)
        joules[name], seconds = 3.6e6 * kwh / tokens, callbacks[1].seconds
        text = (
            f"{joules[name]:.5f} J a token, {tokens / seconds:.0f} tokens/s, {3.6e6 * kwh / seconds:.0f} W; "
            f"{kwh * 1e9 / tokens:.1f} kWh and {grams * 1e6 / tokens:.1f} kg CO2e a billion tokens"
        )
        measured(f"1B, {name}, CO2e at {GRID:g} g a kWh", text)
        print(name, text, flush=True)
        assert grams == pytest.approx(kwh * GRID)
        # A GPU draws 0.1 to 1 kW.
        assert 100 < 3.6e6 * kwh / seconds < 1000
        del model, callbacks, options, data
        gc.collect()
        torch.cuda.empty_cache()
    measured("row / bf16", f"{joules['row'] / joules['bf16']:.3f}")
    print(f"row / bf16 {joules['row'] / joules['bf16']:.3f}", flush=True)


class Seconds(pl.Callback):
    """Time of the measured steps."""

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step in (WARM, WARM + MEASURED):
            torch.cuda.synchronize()
            self.seconds = time.perf_counter() - getattr(self, "seconds", 0.0)
