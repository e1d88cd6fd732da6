"""The comparison behind `make train`, on a model small enough to take seconds, with every recipe."""

from __future__ import annotations

import csv
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from examples import compare
from examples.llama import LlamaConfig
from examples.model import LlamaModule
from examples.plan import MAX_DEFAULT_STEPS
from examples.recorder import Curve
from lightning_int8 import PRESETS

CONFIGS = Path(__file__).parents[1] / "examples" / "configs"
STEPS = 6


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("compare")
    choose = random.Random(0)
    text = folder / "text.txt"
    text.write_text("\n".join(" ".join(choose.choices("abcdefghij", k=12)) for _ in range(600)))
    config = yaml.safe_load((CONFIGS / "tiny.yaml").read_text())
    config["model"]["init_args"]["config"] = {
        "vocab_size": 300, "dim": 64, "n_layers": 1, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 96, "max_seq_len": 32,
    }  # fmt: skip
    config["data"]["init_args"] = {"sequence_length": 32, "batch_size": 8, "vocab_size": 300, "val_fraction": 0.1}
    file = folder / "small.yaml"
    file.write_text(yaml.safe_dump(config))
    return folder, [
        "--config", str(file), "--text", str(text), "--cache-dir", str(folder / "cache"), "--accelerator", "cpu",
        "--steps", str(STEPS), "--val-batches", "2", "--output", str(folder / "runs"),
    ]  # fmt: skip


@pytest.mark.parametrize("recipe", list(PRESETS))
def test_every_recipe_trains_and_leaves_its_files(setting, recipe: str, capsys) -> None:
    folder, arguments = setting
    run = compare.main([*arguments, "--recipe", recipe])
    assert (folder / "runs" / "latest").resolve() == run.resolve()
    printed = capsys.readouterr().out
    assert f"INT8 ({recipe})" in printed
    assert "full precision" in printed

    summary = json.loads((run / "summary.json").read_text())
    full, int8 = summary["full_precision"], summary["int8"]
    assert summary["recipe"] == recipe
    assert summary["steps"] == STEPS
    assert recipe in summary["command"]
    assert summary["versions"]["torch"] == torch.__version__
    assert summary["gap_percent"] == pytest.approx(100 * (int8["val_loss"] / full["val_loss"] - 1), abs=1e-9)
    assert abs(summary["gap_percent"]) < 1.0
    assert full["val_loss"] < math.log(300)
    has_fallback = PRESETS[recipe].activation_band != (0.0, 0.0)
    assert (summary["fallback_rate"] is not None) == has_fallback
    if has_fallback:
        assert 0.0 <= summary["fallback_rate"] <= 1.0

    with open(run / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(1, STEPS + 1))
    # The same weights and the same batch: only quantization separates the first losses, and it does.
    first_full, first_int8 = (float(rows[0][f"{name}_train_loss"]) for name in ("full_precision", "int8"))
    assert first_full == pytest.approx(first_int8, rel=1e-2)
    assert first_full != first_int8
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (run / "fallback_rate.png").exists() == has_fallback
    assert (run / "sample.txt").read_text().startswith("def")
    for name in ("full_precision", "int8"):
        assert (run / name / "metrics.csv").exists()
        state = torch.load(run / name / "checkpoints" / "last.ckpt", weights_only=True)
        assert state["global_step"] == STEPS
        LlamaModule(state["hyper_parameters"]["config"]).load_state_dict(state["state_dict"], strict=True)


def test_unfinished_run_leaves_latest_alone(setting, tmp_path, monkeypatch) -> None:
    _, arguments = setting
    arguments = [*arguments[:-1], str(tmp_path)]

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(compare, "write_summary", killed)
        with pytest.raises(KeyboardInterrupt):
            compare.main(arguments)
    assert not (tmp_path / "latest").is_symlink()
    finished = compare.main(arguments)
    with monkeypatch.context() as patch:
        patch.setattr(compare, "write_summary", killed)
        with pytest.raises(KeyboardInterrupt):
            compare.main(arguments)
    assert (tmp_path / "latest").resolve() == finished.resolve()
    assert not list(tmp_path.glob(".latest-*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "int4"], "invalid choice: 'int4'"),
        (["--steps", "0"], "argument --steps: '0' must be an integer of at least 1"),
        (["--config", "missing.yaml"], "--config=missing.yaml does not exist; ours are"),
    ],
)
def test_arguments_are_checked(arguments: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit) as error:
        compare.main(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def plan_of(*arguments: str):
    return compare.parse_arguments(["--accelerator", "cpu", *arguments]).plan


def test_plan_follows_the_config_and_the_command_line() -> None:
    plan = plan_of("--config", str(CONFIGS / "125m.yaml"))
    assert plan.steps == MAX_DEFAULT_STEPS
    assert plan.precision == "32-true"
    assert plan.model["warmup_steps"] < plan.steps
    plan = plan_of("--seed", "7", "--steps", "9")
    assert (plan.steps, plan.seed, plan.data["seed"]) == (9, 7, 7)
    assert plan_of("--config", str(CONFIGS / "1b.yaml")).trainer["accumulate_grad_batches"] == 4


def changed(folder: Path, **changes: Any) -> Path:
    """tiny.yaml with other values at dotted names, whose dots are double underscores here."""
    config = yaml.safe_load((CONFIGS / "tiny.yaml").read_text())
    for name, value in changes.items():
        *parents, last = name.split("__")
        part = config
        for parent in parents:
            part = part[parent]
        part[last] = value
    file = folder / "changed.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def test_plugin_of_the_config_is_taken_as_it_is(tmp_path) -> None:
    recipe = {"preset": "block", "block_size": 32}
    own = {"recipe": recipe, "precision": "32-true", "min_features": 200, "keep_weights": True}
    file = str(changed(tmp_path, trainer__plugins__init_args=own))
    plan = plan_of("--config", file)
    assert (plan.plugin, plan.recipe) == (own, "block+")
    plan = plan_of("--config", file, "--recipe", "rowwise", "--precision", "bf16-mixed")
    assert (plan.plugin, plan.recipe) == (own | {"recipe": "rowwise", "precision": "bf16-mixed"}, "rowwise")


def test_a_config_is_read_as_fit_reads_it(tmp_path) -> None:
    file = changed(tmp_path, data__init_args__vocab_size="${model.init_args.config.vocab_size}")
    file.write_text(file.read_text().replace("learning_rate: 0.001", "learning_rate: 1e-3"))
    plan = plan_of("--config", str(file))
    assert (plan.data["vocab_size"], plan.model["learning_rate"]) == (4096, 1e-3)
    plan = plan_of("--config", str(changed(tmp_path, model__init_args__optimizer="torch.optim.NAdam")))
    module, data = plan.make()
    assert type(module.optimizer([torch.zeros(1, requires_grad=True)])) is torch.optim.NAdam
    assert (data.batch_size, data.seed) == (16, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "has no model.class_path; is it one to put over another"),
        (
            {"model__class_path": "my.Model"},
            "model.class_path: my.Model is not examples.model.LlamaModule, which alone",
        ),
        ({"data__class_path": "my.Data"}, "data.class_path: my.Data is not examples.data.TextDataModule"),
        ({"trainer__plugins": [{"class_path": "my.Plugin"}]}, "trainer.plugins.class_path: my.Plugin is not"),
        ({"data__init_args__bacth_size": 3}, "bacth_size"),
        ({"trainer__plugins__init_args": {"recipe": "int4"}}, "Unknown recipe 'int4'"),
        ({"trainer__strategy": "ddp", "trainer__max_epochs": 2}, "not honour trainer.max_epochs, trainer.strategy."),
        ({"trainer__devices": 2}, "does not honour trainer.devices=2 (one device is used)"),
        ({"trainer__callbacks": [{"class_path": "my.EMA"}]}, "does not honour trainer.callbacks: my.EMA"),
        ({"ckpt_path": "last.ckpt"}, "does not honour ckpt_path"),
        ({"trainer__limit_val_batches": 0}, "trainer.limit_val_batches: 0 leaves nothing to compare"),
        ({"seed_everything": True}, "seed_everything: True must be a number"),
    ],
)
def test_what_a_config_asks_for_is_honoured_or_refused(tmp_path, changes, message, capsys) -> None:
    with pytest.raises(SystemExit):
        plan_of("--config", str(changed(tmp_path, **changes)))
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_defaults_that_a_saved_config_spells_out_are_no_matter(tmp_path) -> None:
    saved = changed(tmp_path, trainer__strategy="auto", trainer__max_epochs=None, trainer__logger=None, ckpt_path=None)
    assert plan_of("--config", str(saved)).steps == 100


def test_a_gpu_that_is_not_there_is_refused(monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments, message in (
        (["--accelerator", "gpu"], "accelerator gpu: PyTorch sees no CUDA GPU here"),
        (["--precision", "16-mixed"], "precision 16-mixed needs a GPU"),
    ):
        with pytest.raises(SystemExit):
            compare.parse_arguments(arguments)
        assert message in capsys.readouterr().err.splitlines()[-1]


def test_accumulated_micro_batches_make_one_step(setting, tmp_path) -> None:
    folder, arguments = setting
    config = yaml.safe_load((folder / "small.yaml").read_text())
    config["trainer"]["accumulate_grad_batches"] = 2
    file = tmp_path / "accumulated.yaml"
    file.write_text(yaml.safe_dump(config))
    whole = compare.parse_arguments(arguments).plan
    parts = compare.parse_arguments([*arguments, "--config", str(file), "--batch-size", "4"]).plan
    curves = [
        compare.train(compare.FULL_PRECISION, plan, tmp_path / str(index))[0]
        for index, plan in enumerate((whole, parts))
    ]
    assert list(curves[1].train_loss) == list(range(1, STEPS + 1))
    assert list(curves[1].train_loss.values()) == pytest.approx(list(curves[0].train_loss.values()), rel=1e-4)
    assert list(curves[1].val_loss) == list(curves[0].val_loss)


def test_summary_is_valid_json_where_nothing_was_timed(setting) -> None:
    _, arguments = setting
    run = compare.main([*arguments, "--steps", "1"])
    assert "NaN" not in (run / "summary.json").read_text()
    assert json.loads((run / "summary.json").read_text())["int8"]["tokens_per_second"] is None


@pytest.mark.parametrize("name", ["tiny", "125m", "1b"])
def test_configs_describe_matching_models_and_data(name: str) -> None:
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    model = LlamaConfig(**config["model"]["init_args"]["config"])
    data = config["data"]["init_args"]
    assert model.vocab_size >= data["vocab_size"]
    assert model.max_seq_len >= data["sequence_length"]
    assert all(value % 16 == 0 for value in (model.dim, model.ffn_dim, model.vocab_size))


def test_curve_summarizes_its_tail() -> None:
    curve = Curve(train_loss={step: float(step) for step in range(1, 21)}, val_loss={10: 2.0, 20: 1.0})
    assert curve.final_train_loss == 19.5
    assert curve.final_val_loss == 1.0
    assert curve.mean_fallback_rate is None
    assert math.isnan(curve.tokens_per_second)
