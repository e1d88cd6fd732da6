"""The accuracy study on a model that trains in seconds: resuming, what is compared with what, and its text."""

from __future__ import annotations

import csv
import json
import random
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import yaml

from examples.llama import LlamaConfig
from examples.study import corpus, train
from examples.study.__main__ import main
from examples.study.module import StudyModule
from examples.study.plan import PLANS, Run, in_order, load

SMALL = {"vocab_size": 301, "dim": 32, "n_layers": 1, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 64, "max_seq_len": 32}
SHARED = {
    "tokens": 12 * 4 * 32,
    "evaluations": 3,
    "val_batches": 2,
    "accelerator": "cpu",
    "data": {"sequence_length": 32, "batch_size": 4, "vocab_size": 300, "val_fraction": 0.2, "max_bytes": 30_000},
    "model": {"learning_rate": 1e-3, "warmup_steps": 2, "config": SMALL},
}


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Runs the study with some runs' YAMLs and returns its results by name."""
    choose = random.Random(0)
    texts = {f"{i}.py": " ".join(choose.choices("abcdefghij", k=2000)) for i in range(8)}
    monkeypatch.setattr(corpus, "collect", lambda name, most: {f"{name}/{k}": v[:most] for k, v in texts.items()})
    shared = {**SHARED, "data": {**SHARED["data"], "cache_dir": str(tmp_path / "cache")}}
    (tmp_path / "shared.yaml").write_text(yaml.safe_dump(shared))
    plans = tmp_path / "plans"
    plans.mkdir()

    def run(output: str, **runs: dict) -> dict[str, dict]:
        for name, fields in runs.items():
            (plans / f"{name}.yaml").write_text(yaml.safe_dump(fields))
        arguments = ["--shared", tmp_path / "shared.yaml", "--plans", plans, "--output", tmp_path / output]
        folder = main([str(argument) for argument in [*arguments, "--runs", *runs]])
        return {name: json.loads((folder / name / "result.json").read_text()) for name in runs} | {"folder": folder}

    return run


@pytest.mark.parametrize(
    "fields",
    [{"int8": {"preset": "row", "block_size": 16}}, {"objective": "masked", "model": {"causal": False}}],
    ids=["row", "masked"],
)
def test_a_run_that_was_cut_off_ends_as_one_that_was_not(study, fields, monkeypatch):
    whole = study("whole", one=fields)["one"]
    monkeypatch.setattr(train, "CHECKPOINT_EVERY", timedelta(0))
    step = StudyModule.training_step

    def cut_off(module, batch, batch_idx):
        if module.global_step == 7:
            raise RuntimeError("the machine went away")
        return step(module, batch, batch_idx)

    monkeypatch.setattr(StudyModule, "training_step", cut_off)
    with pytest.raises(FileNotFoundError, match=r"result\.json"):
        study("resumed", one=fields)
    monkeypatch.setattr(StudyModule, "training_step", step)
    resumed = study("resumed", one=fields)["one"]
    assert len(whole["curve"]["train_loss"]) == 12
    assert resumed["curve"] == whole["curve"]
    assert resumed["val_loss"] == whole["val_loss"]


def test_finished_runs_are_kept_and_compared_with_the_baseline_of_their_kind(study, monkeypatch):
    small_blocks = {"preset": "row", "block_size": 16}
    runs = {
        "base": {"keep_weights": True},
        "other-seed": {"seed": 1},
        "row": {"int8": small_blocks},
        "gelu": {"model": {"ffn": "gelu"}},
        "gelu-row": {"model": {"ffn": "gelu"}, "int8": small_blocks},
        "tuned-row": {"corpus": "headers", "init_from": "base", "int8": small_blocks, "share": 0.5},
    }
    results = study("out", **runs)
    folder = results["folder"]
    assert results["tuned-row"]["steps"] == 6
    assert results["tuned-row"]["curve"]["train_loss"]["1"] < results["base"]["curve"]["train_loss"]["1"] - 0.2
    assert results["base"]["extra_mmas"] is None
    assert 0.1 < results["row"]["extra_mmas"] < 0.5

    with open(folder / "results.csv", newline="") as lines:
        rows = {row["run"]: row for row in csv.DictReader(lines)}
    base = results["base"]["val_loss"]
    deviation = abs(results["base"]["val_loss"] - results["other-seed"]["val_loss"]) / 2**0.5
    gap = results["row"]["val_loss"] - base
    assert float(rows["row"]["gap_percent"]) == pytest.approx(100 * gap / base, abs=1e-3)
    assert float(rows["row"]["gap_in_seed_deviations"]) == pytest.approx(gap / deviation, abs=0.06)
    gelu = results["gelu-row"]["val_loss"] / results["gelu"]["val_loss"] - 1
    assert float(rows["gelu-row"]["gap_percent"]) == pytest.approx(100 * gelu, abs=1e-3)
    assert rows["gelu-row"]["gap_in_seed_deviations"] == ""
    assert rows["tuned-row"]["gap_percent"] == ""
    assert "| gelu-row |" in (folder / "study.md").read_text()
    assert (folder / "curves.png").stat().st_size > 10_000
    with open(folder / "fallback_rate.csv", newline="") as lines:
        assert {row["run"] for row in csv.DictReader(lines)} == {"row", "gelu-row", "tuned-row"}

    def refuse(*_):
        raise AssertionError("a finished run trains again")

    monkeypatch.setattr(StudyModule, "training_step", refuse)
    assert study("out", **runs)["row"] == results["row"]


def test_a_changed_run_does_not_mix_with_earlier_results(study, capsys):
    study("out", one={"seed": 0})
    study("out", one={"seed": 1})
    assert "another configuration" in capsys.readouterr().out


def test_masked_loss_is_of_the_masked_tokens_only():
    torch.manual_seed(0)
    module = StudyModule(objective="masked", compile_layers=False, config=LlamaConfig(**{**SMALL, "causal": False}))
    seen: list[torch.Tensor] = []
    module.model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    batch = torch.randint(300, (64, 33))
    loss = module.loss(batch, 3)
    masked = seen[0] == 300
    assert torch.equal(seen[0][~masked], batch[:, :-1][~masked])
    # Shares from 0.1 to 1, evenly.
    assert 0.45 < masked.float().mean() < 0.65
    # Untrained, every token costs about ln 301 = 5.7, and the weights make up for what is not masked.
    assert loss.item() == pytest.approx(5.7, abs=0.5)
    assert module.loss(batch, 3).item() == loss.item()
    assert module.loss(batch, 4).item() != loss.item()


def test_every_yaml_of_the_study_is_a_run():
    runs = in_order([load(file) for file in sorted(PLANS.glob("*.yaml"))])
    names = [run.name for run in runs]
    assert {"bf16-seed0", "bf16-seed1", "bf16-seed2", "row", "float8-rowwise"} <= set(names)
    for run in runs:
        assert run.init_from is None or names.index(run.init_from) < names.index(run.name)
        assert run.int8 is None or run.recipe is not None
        LlamaConfig(**{**SMALL, **run.model})
    assert {run.name for run in runs if run.keep_weights} >= {run.init_from for run in runs if run.init_from}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"int8": "row", "float8": "rowwise"}, "exclude each other"),
        ({"float8": "columns"}, "must be one of"),
        ({"share": 0}, "above 0"),
    ],
)
def test_wrong_runs(fields, message):
    with pytest.raises(ValueError, match=message):
        Run("one", **fields)


def test_wrong_yaml(tmp_path):
    (tmp_path / "one.yaml").write_text("recipe: row")
    with pytest.raises(ValueError, match="unknown field"):
        load(tmp_path / "one.yaml")
    with pytest.raises(ValueError, match="init_from='two'"):
        in_order([Run("one", init_from="two")])


def test_the_text_of_this_machine():
    texts = corpus.collect("python", 300_000)
    assert 300_000 <= sum(len(text.encode()) for text in texts.values()) < 300_000 + 4 * corpus.MAX_FILE_CHARS
    assert len(set(texts.values())) == len(texts)
    assert {Path(name).suffix for name in texts} <= {".py", ".pyi", ".md", ".rst"}
    assert any("#include" in text for text in corpus.collect("headers", 300_000).values())
