"""`examples/finetune.py` on tiny random models and a tokenizer in local folders; nothing is downloaded."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from examples import finetune
from examples.text import END_OF_TEXT, train_tokenizer

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install -e '.[dev]'")

WORDS = "a step moves each weight a little against its gradient and the loss goes down "


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(WORDS[i % 40 :] + WORDS[: i % 40] for i in range(300)))
    return path


def save_model(folder: Path, text: Path, tied: bool) -> Path:
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer([text.read_text()], 300), eos_token=END_OF_TEXT
    )
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=64, tie_word_embeddings=tied,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def arguments(text: Path, out: Path, *more: str) -> list[str]:
    sizes = ["--sequence-length", "32", "--batch-size", "4", "--steps", "12", "--learning-rate", "3e-3"]
    return ["--text", str(text), "--out", str(out), "--accelerator", "cpu", *sizes, *more]


@pytest.mark.parametrize("steps", [1, 2, 19, 100])
def test_the_learning_rate_reaches_its_peak(steps: int) -> None:
    factors = [finetune.warmup_linear(step, steps) for step in range(steps + 1)]
    peak = max(0, steps // 10 - 1)
    assert factors[peak] == max(factors) == 1.0
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    assert factors[peak + 1 :] == sorted(factors[peak + 1 :], reverse=True)
    assert factors[-1] == 0.0


@pytest.mark.parametrize(("tied", "precision"), [(False, "32-true"), (True, "bf16-mixed")])
def test_a_local_model_learns_and_loads_again(tmp_path, text: Path, capsys, tied: bool, precision: str) -> None:
    model = save_model(tmp_path / "model", text, tied)
    losses = finetune.main([str(model), *arguments(text, tmp_path / "out", "--precision", precision)])
    shown = capsys.readouterr().out
    assert "ignored by 'lm_head'" in shown
    assert f"Wrote {tmp_path / 'out'}: train_loss" in shown
    # Untrained, it is ln(300) = 5.7.
    assert losses["train_loss"] < 5.0
    assert losses["val_loss"] < 5.2
    tuned = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert all(type(m) is torch.nn.Linear for m in tuned.modules() if isinstance(m, torch.nn.Linear))
    ids = torch.tensor([tokenizer(WORDS)["input_ids"]])
    assert tuned(input_ids=ids, labels=ids).loss < 5.2


def test_lora_trains_adapters_only_and_merges_them(tmp_path, text: Path, capsys) -> None:
    pytest.importorskip("peft", reason="peft is not installed: pip install -e '.[dev]'")
    folder = save_model(tmp_path / "model", text, tied=False)
    losses = finetune.main(
        [str(folder), *arguments(text, tmp_path / "out", "--lora-rank", "4", "--precision", "32-true")]
    )
    assert "ignored by 'lora_A'" in capsys.readouterr().out
    before, after = (
        transformers.AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (folder, tmp_path / "out")
    )
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    linears = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert {name.split(".")[-2] for name in changed} == set(linears)
    # Untrained, it is ln(300) = 5.704.
    assert losses["val_loss"] < 5.69


def test_errors_say_what_to_give(tmp_path, text: Path, capsys) -> None:
    rest = arguments(text, tmp_path / "out")
    with pytest.raises(SystemExit, match=r"The model folder '/nowhere/model' does not exist; give one that save_pretr"):
        finetune.main(["/nowhere/model", *rest])
    with pytest.raises(SystemExit, match=r"holds no config\.json"):
        finetune.main([str(tmp_path), *rest])
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"Cannot load .* in that folder"):
        finetune.main([str(tmp_path), *rest])
    model = save_model(tmp_path / "model", text, False)
    with pytest.raises(SystemExit):
        finetune.main([str(model), *rest, "--sequence-length", "64"])
    assert "--sequence-length 64 is too long for the model: at most 63" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="The text path"):
        finetune.main([str(model), *arguments(tmp_path / "no text", tmp_path / "out")])


def test_without_transformers_it_says_what_to_install(monkeypatch) -> None:
    # What Python does for a module that is not installed, where it is.
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SystemExit, match="pip install transformers"):
        finetune.load("some/model")
