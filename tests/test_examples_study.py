"""The accuracy study on a model that trains in seconds: resuming, what is compared with what, and its text."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import math
import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from examples.llama import LlamaConfig
from examples.study import corpus
from examples.study.__main__ import main, parse_arguments
from examples.study.module import StudyModule
from examples.study.plan import PLANS, Run, in_order, load
from examples.study.queue import Job, _take
from examples.study.results import _late_gap, write_results
from examples.study.train import OutOfTimeError, train
from examples.study.turns import TakeTurns

SMALL = {"vocab_size": 301, "dim": 32, "n_layers": 1, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 64, "max_seq_len": 32}
SHARED = {
    "tokens": 12 * 4 * 32,
    "evaluations": 3,
    "branch_at": 0.5,
    "val_batches": 2,
    "accelerator": "cpu",
    "data": {"sequence_length": 32, "batch_size": 4, "vocab_size": 300, "val_fraction": 0.2, "max_bytes": 30_000},
    "model": {"learning_rate": 1e-3, "warmup_steps": 2, "compile": None, "config": SMALL},
}


@pytest.fixture
def shared(tmp_path, monkeypatch) -> dict[str, Any]:
    """What the runs share, on a text made here."""
    choose = random.Random(0)
    texts = {f"{i}.py": " ".join(choose.choices("abcdefghij", k=2000)) for i in range(8)}
    monkeypatch.setattr(corpus, "collect", lambda name, most: {f"{name}/{k}": v[:most] for k, v in texts.items()})
    return {**SHARED, "data": {**SHARED["data"], "cache_dir": str(tmp_path / "cache")}}


@pytest.fixture
def study(tmp_path, shared):
    """Runs the study with some runs' YAMLs, two at a time or as told, and returns the folder of its results."""
    (tmp_path / "shared.yaml").write_text(yaml.safe_dump(shared))
    plans = tmp_path / "plans"
    plans.mkdir()

    def run(how: str = "--devices 2", **runs: dict) -> Path:
        for name, fields in runs.items():
            (plans / f"{name}.yaml").write_text(yaml.safe_dump(fields))
        arguments = ["--shared", tmp_path / "shared.yaml", "--plans", plans, "--output", tmp_path / "out"]
        return main([str(argument) for argument in [*arguments, *how.split(), "--runs", *runs]])[0]

    return run


def _results(folder: Path) -> dict[str, Any]:
    return {file.parent.name: json.loads(file.read_text()) for file in folder.glob("*/result.json")}


@pytest.mark.parametrize(
    "fields",
    [{"int8": {"preset": "row", "block_size": 16}}, {"objective": "masked", "model": {"causal": False}}],
    ids=["row", "masked"],
)
def test_a_run_that_was_stopped_after_every_step_ends_as_one_that_was_not(shared, tmp_path, fields):
    run = Run("one", **fields)
    whole = train(run, shared, tmp_path / "whole", None)
    for step in range(1, whole["steps"]):
        with pytest.raises(OutOfTimeError, match=f"stopped after {step} of 12 steps"):
            train(run, shared, tmp_path / "stopped", None, stop_at=0.0)
    stopped = train(run, shared, tmp_path / "stopped", None, stop_at=0.0)
    assert len(whole["curve"]["train_loss"]) == 12
    assert stopped["curve"] == whole["curve"]
    assert stopped["val_loss"] == whole["val_loss"]
    assert not (tmp_path / "stopped" / "last.ckpt").exists()


def test_a_run_that_branches_goes_on_where_its_parent_was(study):
    folder = study(
        **{
            "parent": {"keep_branch": True},
            "same": {"branch_from": "parent"},
            "int8": {"branch_from": "parent", "int8": {"preset": "row", "block_size": 16}},
            "fp8": {"branch_from": "parent", "peer": "fp8-rowwise"},
        }
    )
    results = _results(folder)
    parent, same = results["parent"], results["same"]
    assert same["curve"]["train_loss"] == parent["curve"]["train_loss"]
    assert same["val_loss"] == parent["val_loss"]
    for name in ("int8", "fp8"):
        losses = results[name]["curve"]["train_loss"]
        parted = [step for step in losses if losses[step] != parent["curve"]["train_loss"][step]]
        assert parted == ["7", "8", "9", "10", "11", "12"]
        assert losses["12"] == pytest.approx(parent["curve"]["train_loss"]["12"], rel=1e-2)
    with open(folder / "results.csv", newline="") as lines:
        rows = {row["run"]: row for row in csv.DictReader(lines)}
    int8 = results["int8"]
    assert int8["val_loss_full_precision"] != int8["val_loss"]
    assert int8["val_loss_full_precision"] == pytest.approx(int8["val_loss"], rel=1e-3)
    assert parent["val_loss_full_precision"] == parent["val_loss"]
    gap = 100 * (int8["val_loss_full_precision"] / same["val_loss"] - 1)
    assert float(rows["int8"]["weights_gap_percent"]) == pytest.approx(gap, abs=6e-4)
    late = [results["int8"]["curve"]["train_loss"][s] - same["curve"]["train_loss"][s] for s in ("10", "11", "12")]
    assert float(rows["int8"]["late_gap_millinats"]) == pytest.approx(1e3 * sum(late) / 3, abs=0.006)
    assert float(rows["same"]["late_gap_millinats"]) == 0
    assert rows["parent"]["late_gap_millinats"] == ""


def test_one_batch_whose_loss_jumps_leaves_the_late_gap_as_it_is():
    steps = 400
    base, run = ({str(step): 2.0 + gap for step in range(1, steps + 1)} for gap in (0.0, 1e-4))
    run["350"] += 5.0
    results = [{"steps": steps, "curve": {"train_loss": losses}} for losses in (run, base)]
    assert _late_gap(*results) == pytest.approx((0.1, 0.0), abs=1e-9)


def test_branches_are_compared_with_their_own_trunk(study):
    row = {"preset": "row", "block_size": 16}
    gelu = {"model": {"ffn": "gelu"}}
    masked = {"model": {"causal": False}, "objective": "masked"}
    folder = study(
        # One trains, the next one gets ready.
        "--devices 1 --ahead",
        **{
            "swiglu": {"keep_branch": True},
            "gelu": {**gelu, "keep_branch": True},
            "masked": {**masked, "keep_branch": True},
            "swiglu-row": {"branch_from": "swiglu", "int8": row},
            "gelu-row": {**gelu, "branch_from": "gelu", "int8": row},
            "masked-row": {**masked, "branch_from": "masked", "int8": row},
            "masked-fp8": {**masked, "branch_from": "masked", "peer": "fp8-rowwise"},
            "masked-same": {**masked, "branch_from": "masked"},
        },
    )
    results = _results(folder)
    # The same masks in the trunk and its branches, in evaluations too.
    assert results["masked-same"]["curve"] == results["masked"]["curve"]
    with open(folder / "results.csv", newline="") as lines:
        rows = {row["run"]: row for row in csv.DictReader(lines)}
    for branch, trunk in (
        ("swiglu-row", "swiglu"),
        ("gelu-row", "gelu"),
        ("masked-row", "masked"),
        ("masked-fp8", "masked"),
    ):
        mine, base = results[branch], results[trunk]
        losses, others = mine["curve"]["train_loss"], base["curve"]["train_loss"]
        assert [step for step in losses if losses[step] != others[step]] == ["7", "8", "9", "10", "11", "12"]
        late = sum(losses[step] - others[step] for step in ("10", "11", "12")) / 3
        assert float(rows[branch]["late_gap_millinats"]) == pytest.approx(1e3 * late, abs=0.006)
        gap, weights_gap = (
            100 * (mine[loss] / base["val_loss"] - 1) for loss in ("val_loss", "val_loss_full_precision")
        )
        assert float(rows[branch]["gap_percent"]) == pytest.approx(gap, abs=6e-4)
        assert float(rows[branch]["weights_gap_percent"]) == pytest.approx(weights_gap, abs=6e-4)
        # Far below what parts the trunks.
        assert abs(gap) < 1


def test_runs_take_turns_after_the_steps_that_compile(tmp_path):
    first, second = (TakeTurns(tmp_path / "turns", math.inf) for _ in range(2))

    def start_batches(run: TakeTurns, count: int) -> None:
        for i in range(count):
            run.on_train_batch_start(None, None, None, i)

    start_batches(first, 4)
    start_batches(second, 3)
    waiting = threading.Thread(target=start_batches, args=(second, 1), daemon=True)
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive()
    first.release()
    waiting.join(10)
    assert not waiting.is_alive()
    # The second has it now; who is out of time does not wait for it.
    third = TakeTurns(tmp_path / "turns", time.time() + 0.2)
    start_batches(third, 5)
    assert time.time() >= third.until


def test_what_is_done_of_a_branch_is_of_its_own_steps(shared, tmp_path):
    train(Run("trunk", keep_branch=True), shared, tmp_path / "trunk", None)
    branch = Run("branch", branch_from="trunk")
    for done in (1 / 6, 2 / 6):
        with pytest.raises(OutOfTimeError) as stopped:
            train(branch, shared, tmp_path / "branch", tmp_path / "trunk" / "branch.ckpt", stop_at=0.0)
        assert stopped.value.share_done == pytest.approx(done)


def test_runs_of_a_few_steps_have_results_too(tmp_path, shared):
    shared = {**shared, "tokens": 3 * 4 * 32, "evaluations": 1}
    runs = [Run("base"), Run("row", int8={"preset": "row", "block_size": 16})]
    write_results(tmp_path, [(run, train(run, shared, tmp_path / run.name, None)) for run in runs], shared)
    with open(tmp_path / "results.csv", newline="") as lines:
        row = list(csv.DictReader(lines))[1]
    assert (row["run"], row["late_gap_millinats"]) == ("row", "")
    assert float(row["gap_percent"]) == pytest.approx(0, abs=1)


def test_a_stopped_run_counts_the_time_of_all_its_tokens(shared, tmp_path, monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr("examples.recorder.time.perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr("examples.recorder.Recorder.WARMUP_STEPS", 0)
    tokens = 4 * 32
    with pytest.raises(OutOfTimeError, match="stopped after 1 of 12 steps"):
        train(Run("one"), shared, tmp_path / "one", None, stop_at=0.0)
    saved = torch.load(tmp_path / "one" / "last.ckpt", weights_only=True)["callbacks"]["Recorder"]
    assert (saved["train_tokens"], saved["train_seconds"]) == (tokens, 1.0)


def test_a_run_that_is_lost_fails_and_leaves_no_result(shared, tmp_path):
    shared = {**shared, "model": {**shared["model"], "learning_rate": 1e30}}
    with pytest.raises(RuntimeError, match=r"held-out loss is nan after step 4"):
        train(Run("one"), shared, tmp_path / "one", None)
    assert not (tmp_path / "one" / "result.json").exists()


def test_finished_runs_are_kept_and_compared_with_the_baseline_of_their_kind(study, capsys):
    small_blocks = {"preset": "row", "block_size": 16}
    runs = {
        # Fails, and must cost the others nothing.
        "broken": {"model": {"dim": 31}},
        # Waits for the weights of the next one, which comes before it.
        # 5 steps, so that its last evaluation is not one of the training's.
        "tuned-fp8": {"corpus": "headers", "init_from": "base", "peer": "fp8-rowwise", "share": 5.5 / 12},
        "tuned-row": {"corpus": "headers", "init_from": "base", "int8": small_blocks, "share": 0.5},
        "base": {"keep_weights": True},
        "other-seed": {"seed": 1},
        "row": {"int8": small_blocks},
        "gelu": {"model": {"ffn": "gelu"}},
        "gelu-row": {"model": {"ffn": "gelu"}, "int8": small_blocks},
    }
    folder = study(**runs)
    results = _results(folder)
    assert set(results) == set(runs) - {"broken"}
    said = capsys.readouterr().out
    assert "LlamaConfig.dim=31" in said
    assert "7 of 8 runs are done; not: broken@1536" in said
    assert results["tuned-row"]["steps"] == 6
    assert results["tuned-row"]["curve"]["train_loss"]["1"] < results["base"]["curve"]["train_loss"]["1"] - 0.2
    assert results["base"]["extra_mmas"] is None
    assert 0.05 < results["row"]["extra_mmas"] < 0.5

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

    written = {file: file.stat().st_mtime_ns for file in folder.glob("*/result.json")}
    study(row=runs["row"])
    # A call for some of the runs leaves the others in the tables.
    assert "| gelu-row |" in (folder / "study.md").read_text()
    assert written == {file: file.stat().st_mtime_ns for file in folder.glob("*/result.json")}


def test_a_changed_run_does_not_mix_with_earlier_results(study, capsys):
    folder = study(one={"seed": 0})
    (folder / "one" / "result.json").unlink()
    study(one={"seed": 1})
    assert "another configuration" in capsys.readouterr().out


def test_the_order_of_the_runs(tmp_path):
    def job(name: str, tokens: int, start: Path | None = None, done: float | None = None, kind: str = "") -> Job:
        made = Job(name, tmp_path, {}, tmp_path, start, tokens, kind)
        made.folder.mkdir()
        if done is not None:
            (made.folder / "stopped").write_text(str(done))
        return made

    finished = job("finished", 1000)
    (finished.folder / "result.json").write_text('{"tokens_per_second": 100}')
    faster = job("faster", 1000, kind="fast")
    (faster.folder / "result.json").write_text('{"tokens_per_second": 2000}')
    long, short, fast = job("long", 30000), job("short", 1000), job("fast", 30000, kind="fast")
    jobs = [
        finished,
        faster,
        job("tuned", 1, tmp_path / "long" / "weights.pt"),
        long,
        short,
        job("begun", 30000, done=0.95),
        fast,
    ]
    waiting = jobs[2:]
    # In 60 seconds, of which 40 are no training, the short one, the rest of the one begun and the fast one would end.
    names, locks = [], []
    while taken := _take(waiting, jobs, 60.0):
        names.append(taken[0].name)
        locks.append(taken[1])
    assert names == ["short", "begun", "fast", "long"]
    assert [waiter.name for waiter in waiting] == ["tuned"]
    # What another command works on is left to it.
    assert _take([long], jobs, 1e9) is None
    locks[-1].close()
    (long.folder / "weights.pt").touch()
    assert _take([waiting[0], long], jobs, 1e9)[0].name == "tuned"


def test_masked_loss_is_of_the_masked_tokens_only():
    torch.manual_seed(0)
    module = StudyModule(objective="masked", config=LlamaConfig(**{**SMALL, "causal": False}))
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


def test_no_two_yamls_are_the_same_run():
    runs: dict[Any, str] = {}
    for file in sorted(PLANS.glob("*.yaml")):
        run = load(file)
        fields = dataclasses.asdict(run) | {"name": "", "keep_weights": False, "keep_branch": False}
        same = runs.setdefault(repr(fields | {"int8": run.recipe}), run.name)
        assert same == run.name, f"{run.name} repeats {same}"


@pytest.mark.parametrize("arguments", [["--tokens", "-5"], ["--tokens", "nan"], ["--tokens", "0"], ["--runs", "row@0"]])
def test_numbers_of_tokens_are_checked(arguments, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(arguments)
    assert "of at least 1, such as" in capsys.readouterr().err
    assert parse_arguments(["--tokens", "5e6"]).tokens == 5_000_000


def test_every_yaml_of_the_study_is_a_run():
    runs = in_order([load(file) for file in sorted(PLANS.glob("*.yaml"))])
    names = [run.name for run in runs]
    assert {"bf16-seed0", "bf16-seed1", "bf16-seed2", "row", "float8-rowwise"} <= set(names)
    for run in runs:
        if run.parent is not None:
            parent = runs[names.index(run.parent)]
            assert names.index(parent.name) < names.index(run.name)
            # Else its weights would not fit, or its losses not compare.
            assert (parent.model, parent.objective, parent.seed) == (run.model, run.objective, run.seed)
        assert run.int8 is None or run.recipe is not None
        LlamaConfig(**{**SMALL, **run.model})
    assert {run.name for run in runs if run.keep_weights} >= {run.init_from for run in runs if run.init_from}
    assert {run.name for run in runs if run.keep_branch} >= {run.branch_from for run in runs if run.branch_from}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"int8": "row", "peer": "fp8-rowwise"}, "exclude each other"),
        ({"peer": "fp8-columns"}, "must be one of"),
        ({"share": 0}, "above 0"),
        ({"init_from": "a", "branch_from": "b"}, "exclude each other"),
        ({"learning_rate": "1e-4"}, "a number above 0"),
        ({"learning_rate": 0.0}, "a number above 0"),
        ({"learning_rate": 1e-4, "branch_from": "a"}, "no effect on a branch"),
    ],
)
def test_wrong_runs(fields, message):
    with pytest.raises(ValueError, match=message):
        Run("one", **fields)


def test_a_run_may_have_a_learning_rate_of_its_own(shared, tmp_path):
    shared = {**shared, "model": {**shared["model"], "learning_rate": 0.5}}
    curve = train(Run("slow", learning_rate=1e-9), shared, tmp_path / "slow", None)["curve"]["val_loss"]
    assert len(curve) > 1
    assert max(curve.values()) == pytest.approx(min(curve.values()), abs=1e-4)


def test_wrong_yaml(tmp_path):
    (tmp_path / "one.yaml").write_text("recipe: row")
    with pytest.raises(ValueError, match="unknown field"):
        load(tmp_path / "one.yaml")
    with pytest.raises(ValueError, match="init_from='two'"):
        in_order([Run("one", init_from="two")])
    with pytest.raises(ValueError, match="branch_from='two'"):
        in_order([Run("one", branch_from="two")])


def test_the_text_of_this_machine():
    texts = corpus.collect("python", 300_000)
    assert 300_000 <= sum(len(text.encode()) for text in texts.values()) < 300_000 + 4 * corpus.MAX_FILE_CHARS
    assert len(set(texts.values())) == len(texts)
    assert {Path(name).suffix for name in texts} <= set(corpus.SUFFIXES["python"])
    assert any("#include" in text for text in corpus.collect("headers", 300_000).values())
