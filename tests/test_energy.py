"""`EnergyMonitor` with a counter that ticks as told, in real runs; NVML itself on a GPU."""

from __future__ import annotations

import json

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from lightning_int8 import EnergyMonitor, FallbackInt8Precision
from lightning_int8.energy import NvmlReader, count_tokens
from tests.tiny import BATCH, GPU_RECIPE, RECIPE, TinyModule, trainer


class Ticking:
    """A device that draws 3,600 J between two readings."""

    def __init__(self) -> None:
        self.readings = 0

    def joules(self) -> float:
        self.readings += 1
        return 1e6 + 3600.0 * self.readings


def plugin() -> FallbackInt8Precision:
    return FallbackInt8Precision(RECIPE, "32-true")


def test_energy_is_logged_printed_and_written(tmp_path, capsys) -> None:
    monitor = EnergyMonitor(every_n_steps=2, grid_intensity=400, reader=Ticking())
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    run = trainer(tmp_path, plugin=plugin(), callbacks=[monitor], logger=logger, log_every_n_steps=1)
    run.fit(TinyModule(steps=5))
    # Readings: at the start, after steps 2 and 4, at the end.
    saved = json.loads((tmp_path / "lightning_logs/version_0/energy.json").read_text())
    assert saved == {
        "joules": 3 * 3600.0,
        "kwh": pytest.approx(0.003),
        "tokens": 5 * BATCH,
        "joules_per_token": pytest.approx(3 * 3600 / (5 * BATCH)),
        "grid_intensity_g_per_kwh": 400,
        "co2e_g": pytest.approx(1.2),
    }
    rows = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text()
    assert "energy/joules_per_token" in rows.splitlines()[0]
    assert str(3600 / (2 * BATCH)) in rows
    assert "Energy: 0.003 kWh for 320 tokens, 33.75 J a token, 1.2 g CO₂e at 400 g a kWh" in capsys.readouterr().out


def test_a_resumed_run_goes_on_counting(tmp_path) -> None:
    first = EnergyMonitor(every_n_steps=1, reader=Ticking())
    run = trainer(tmp_path, plugin=plugin(), callbacks=[first])
    run.fit(TinyModule(steps=2))
    run.save_checkpoint(tmp_path / "a.ckpt")
    second = EnergyMonitor(every_n_steps=1, reader=Ticking(), dirpath=str(tmp_path / "energy"))
    run = trainer(tmp_path, plugin=plugin(), callbacks=[second], max_epochs=2)
    run.fit(TinyModule(steps=2), ckpt_path=tmp_path / "a.ckpt")
    assert (first.tokens_seen, second.tokens_seen) == (2 * BATCH, 4 * BATCH)
    assert second.joules == 2 * first.joules
    assert second.co2e_grams is None
    assert json.loads((tmp_path / "energy/energy.json").read_text())["tokens"] == 4 * BATCH


def test_an_interrupted_run_leaves_what_it_measured(tmp_path) -> None:
    class Interrupted(TinyModule):
        def training_step(self, batch, batch_index):
            if batch_index == 3:
                raise RuntimeError("stop")
            return super().training_step(batch, batch_index)

    run = trainer(tmp_path, plugin=None, callbacks=[EnergyMonitor(every_n_steps=2, reader=Ticking())])
    with pytest.raises(RuntimeError, match="stop"):
        run.fit(Interrupted(steps=5))
    assert json.loads((tmp_path / "energy.json").read_text())["tokens"] == 3 * BATCH


def test_an_error_before_training_counts_nothing(tmp_path) -> None:
    class Broken(TinyModule):
        def configure_optimizers(self):
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        trainer(tmp_path, plugin=None, callbacks=[EnergyMonitor(reader=Ticking())]).fit(Broken(steps=5))
    assert not (tmp_path / "energy.json").exists()


def test_accumulated_batches_count_once_each(tmp_path) -> None:
    reader = Ticking()
    monitor = EnergyMonitor(every_n_steps=1, reader=reader, tokens=lambda batch: 10)
    trainer(tmp_path, plugin=None, callbacks=[monitor], accumulate_grad_batches=2).fit(TinyModule(steps=4))
    assert monitor.tokens_seen == 40
    assert reader.readings == 1 + 2 + 1


def test_what_counts_as_a_token() -> None:
    floats, integers = torch.zeros(4, 9), torch.zeros(4, 7, dtype=torch.long)
    assert count_tokens({"mask": integers[:, :2], "input_ids": integers}) == 28
    assert count_tokens((floats, integers)) == 28
    assert count_tokens([floats, torch.zeros(4, dtype=torch.long)]) == 4
    assert count_tokens({"a": floats, "b": {"c": integers}}, "a") == 36
    assert count_tokens(object(), lambda batch: 5) == 5
    with pytest.raises(ValueError, match=r"tokens='ids'\): the batch has no tensor of that name, but 'a'"):
        count_tokens({"a": floats}, "ids")
    with pytest.raises(ValueError, match=r"no tensor in a batch of type str; .*EnergyMonitor\(tokens=lambda"):
        count_tokens("text")


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match=r"every_n_steps=0\) must be an integer of at least 1"):
        EnergyMonitor(every_n_steps=0)
    for wrong in (-1, "400", True, float("nan")):
        with pytest.raises(ValueError, match=rf"grid_intensity={wrong!r}\) must be grams of CO₂e a kWh"):
            EnergyMonitor(grid_intensity=wrong)
    with pytest.raises(ValueError, match=r"tokens=5\) must be a batch's key, a function"):
        EnergyMonitor(tokens=5)


def test_without_an_nvidia_gpu_it_says_so_before_training(tmp_path) -> None:
    model = TinyModule()
    with pytest.raises(RuntimeError, match=r"reads NVIDIA GPUs, but the run is on 'cpu'.*EnergyMonitor\(reader="):
        trainer(tmp_path, plugin=None, callbacks=[EnergyMonitor()]).fit(model)
    assert model.losses == []


@pytest.mark.gpu
def test_nvmls_counter_on_a_gpu(tmp_path) -> None:
    pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed: pip install 'lightning-int8[energy]'")
    device = torch.device("cuda", 0)
    reader = NvmlReader(device)
    x = torch.randn(4096, 4096, device=device)
    before = reader.joules()
    for _ in range(300):
        x = torch.nn.functional.normalize(x @ x)
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)
    torch.cuda.synchronize()
    assert 1.0 < reader.joules() - before < 1e5
    monitor = EnergyMonitor(every_n_steps=1, grid_intensity=400, dirpath=str(tmp_path))
    own = FallbackInt8Precision(GPU_RECIPE, "32-true")
    trainer(tmp_path, plugin=own, accelerator="gpu", callbacks=[monitor]).fit(TinyModule(steps=50))
    assert monitor.tokens_seen == 50 * BATCH
    assert monitor.joules >= 0
    assert (tmp_path / "energy.json").exists()
