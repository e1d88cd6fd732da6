"""The command line, as its users run it: YAML, overrides, help, and errors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_int8.cli import main

# It compares with sys.argv, which is pytest's here.
pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")

PLUGIN = """
    class_path: lightning_int8.FallbackInt8Precision
    init_args: {precision: bf16-mixed, ignore_modules: [lm_head], recipe: %s}
"""
CONFIG = """
seed_everything: 1
trainer:
  max_epochs: 1
  accelerator: cpu
  devices: 1
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  plugins: %s
  callbacks:
    - class_path: lightning_int8.FallbackRateMonitor
      init_args: {every_n_steps: 1, dirpath: "${trainer.default_root_dir}"}
  default_root_dir: %s
model:
  class_path: tests.tiny.TinyModule
  init_args: {steps: 2}
"""


@pytest.fixture(autouse=True)
def _quiet_root(monkeypatch, tmp_path):
    # Lightning's own folder names are relative to the current one.
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    monkeypatch.chdir(tmp_path)


def config(tmp_path: Path, recipe: str = "{block_size: 16}", as_list: bool = False) -> str:
    plugin = PLUGIN % recipe
    if as_list:
        plugin = plugin.replace("    class_path", "    - class_path", 1).replace("    init_args", "      init_args", 1)
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG % (plugin, tmp_path / "run"))
    return str(path)


@pytest.mark.parametrize("as_list", [False, True])
def test_fit_from_yaml(tmp_path, capsys, as_list):
    main(["fit", "--config", config(tmp_path, as_list=as_list)])
    out = capsys.readouterr().out
    assert "ignored by 'lm_head'" in out
    assert "Int8Recipe(block_size=16)" in out
    assert (tmp_path / "run/fallback_rate.csv").read_text().count("\n") == 1 + 2 * (4 * 2 - 1)


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_evaluation_commands(tmp_path, capsys, command):
    path = config(tmp_path, "block")
    main([command, "--config", path, "--trainer.callbacks=null"])
    assert "INT8 linear layers, recipe block" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("recipe", "override", "expected"),
    [
        ("row", "block", "recipe block"),
        ("{preset: block, block_size: 64}", "{preset: block, block_size: 32}", "scaling='block', block_size=32"),
        ("jetfire", "llm_int8", "recipe llm_int8"),
    ],
)
def test_recipes_from_yaml_and_overrides(tmp_path, capsys, recipe, override, expected):
    main(["validate", "--config", config(tmp_path, recipe), "--trainer.callbacks=null"])
    main(
        [
            *("validate", "--config", config(tmp_path, recipe), "--trainer.callbacks=null"),
            f"--trainer.plugins.init_args.recipe={override}",
        ]
    )
    first, second = capsys.readouterr().out.split("INT8 linear layers")[1:]
    assert expected not in " ".join(first.split())
    assert expected in " ".join(second.split())


def test_overriding_one_field_keeps_the_preset(tmp_path, capsys):
    arguments = ["fit", "--config", config(tmp_path, "{preset: block, block_size: 64}"), "--print_config"]
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--trainer.plugins.init_args.recipe.block_size=32"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "preset: block" in printed
    assert "block_size: 32" in printed


def test_help_explains_every_argument(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--trainer.plugins.help=lightning_int8.FallbackInt8Precision"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for words in (
        "How the linear layers are quantized",
        "What runs around the INT8 GEMMs",
        "{bf16-mixed,bf16-true,16-mixed,32-true}",
        "Layers to keep in the outer precision",
        "default: row",
    ):
        assert words in text


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--trainer.plugins.init_args.recipe=fp8", "Unknown recipe 'fp8'; the presets are row, block"),
        ("--trainer.plugins.init_args.recipe={block_size: 33}", "block_size=33 must be a multiple of 16"),
        ("--trainer.plugins.init_args.recipe={bloc: 32}", "Unknown recipe field(s) bloc"),
        ("--trainer.plugins.init_args.min_features=-3", "init_args: min_features=-3 must be 'auto' or an integer"),
        ("--trainer.plugins.init_args.ignore_modules=['']", "'' must be a non-empty string"),
        ("--trainer.plugins.init_args.precision=fp8", "'bf16-mixed', 'bf16-true'"),
        ("--trainer.plugins.init_args.ignore=x", "ignore"),
    ],
)
def test_wrong_arguments_are_usage_errors(tmp_path, capsys, argument, message):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", config(tmp_path), argument])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_the_installed_command_takes_modules_of_the_current_folder(tmp_path):
    (tmp_path / "mine.py").write_text("from tests.tiny import TinyModule\nclass Mine(TinyModule):\n    pass\n")
    path = config(tmp_path)
    text = Path(path).read_text().replace("tests.tiny.TinyModule", "mine.Mine")
    Path(path).write_text(text)
    script = Path(sys.executable).with_name("lightning-int8")
    command = [str(script)] if script.exists() else [sys.executable, "-m", "lightning_int8.cli"]
    root = str(Path(__file__).parents[1])
    run = subprocess.run(
        [*command, "fit", "--config", path],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert "INT8 linear layers" in run.stdout
    assert (tmp_path / "run/fallback_rate.png").exists()
