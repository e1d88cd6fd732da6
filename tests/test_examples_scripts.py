"""The Fabric and plain-PyTorch scripts, and the command line on the example's configs."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from examples import fabric_train, finetune, plain_train
from lightning_int8 import PRESETS

ROOT = Path(__file__).parents[1]


@pytest.fixture
def text(tmp_path, monkeypatch) -> str:
    # The scripts keep their cache under the working directory.
    monkeypatch.chdir(tmp_path)
    choose = random.Random(0)
    file = tmp_path / "text.txt"
    file.write_text("\n".join(" ".join(choose.choices("abcdefghij", k=40)) for _ in range(1200)))
    return str(file)


@pytest.mark.parametrize("recipe", list(PRESETS))
def test_plain_loop_learns(text: str, recipe: str, capsys) -> None:
    losses = plain_train.main(["--text", text, "--recipe", recipe, "--steps", "4"])
    assert len(losses) == 4
    assert losses[-1] < losses[0] - 0.3
    assert f"recipe {recipe}" in capsys.readouterr().out


@pytest.mark.strict
def test_fabric_script_resumes_exactly(text: str, tmp_path) -> None:
    arguments = ["--text", text, "--accelerator", "cpu", "--precision", "32-true"]
    whole = fabric_train.main([*arguments, "--steps", "6"])
    checkpoint = str(tmp_path / "fabric.ckpt")
    first = fabric_train.main([*arguments, "--steps", "3", "--checkpoint", checkpoint])
    second = fabric_train.main([*arguments, "--steps", "6", "--checkpoint", checkpoint])
    assert first + second == whole
    assert whole[-1] < whole[0]


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        (plain_train, ["--steps", "-3"]),
        (fabric_train, ["--steps", "0"]),
        (finetune, ["model", "--steps", "0"]),
        (finetune, ["model", "--batch-size", "0"]),
        (finetune, ["model", "--sequence-length", "x"]),
    ],
)
def test_numbers_are_at_least_one(script, arguments: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as error:
        script.main(arguments)
    assert error.value.code == 2
    assert f"{arguments[-2]}: '{arguments[-1]}' must be an integer of at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("script", ["plain_train.py", "fabric_train.py"])
def test_scripts_stay_short(script: str) -> None:
    lines = (ROOT / "examples" / script).read_text().splitlines()
    assert len(lines) <= 80
